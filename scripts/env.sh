# Sourced by quickstart.sh and test.sh: the virtual environment `.venv` with the project, made once.
#
# The stamp holds the hash of what was installed from; while it matches, nothing is run and a second start takes seconds.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

mmspec_environment() {
    local want stamp=.venv/.mmspec-stamp
    want=$(cat pyproject.toml scripts/constraints.txt | sha256sum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
        echo "== environment: .venv (once; pinned by scripts/constraints.txt)"
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
        # torch first and on its own: asked for by another package, a newer build with CUDA could be taken.
        .venv/bin/python -m pip install -q --no-compile -c scripts/constraints.txt \
            "torch==$(sed -n 's/^torch==//p' scripts/constraints.txt)"
        .venv/bin/python -m pip install -q --no-compile -c scripts/constraints.txt -e ".[train,eval,dev]"
        # On all cores, where pip would take one; some packages ship files that are no Python, as templates.
        .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true
        echo "$want" >"$stamp"
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}
