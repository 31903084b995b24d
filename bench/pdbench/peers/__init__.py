"""Other load generators beside ours: SGLang's and vLLM's own bench clients against the same deployment, at the same load.

`commands` says what is typed, `read` what came of it in our names, `beside` both in one table and why they differ.
"""
