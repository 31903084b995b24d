"""`pdbench emulate`: an honest stand-in for an SGLang worker. `server` is the way in, `model` says how long things take."""
