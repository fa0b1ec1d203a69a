"""One module per command, each with `main(argv) -> exit code`; `llmlab/cli.py` lists them and imports the one asked."""
