"""Two threads at most, so that parallel test workers do not fight over two cores."""

import torch

torch.set_num_threads(1)
