"""Heads in the layouts that serving engines read: what each can serve, the files, and a check that reads them back"""
