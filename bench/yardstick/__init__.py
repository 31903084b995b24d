"""`pdbench run` and its peers beside a server that knows when it sent what: `make bench-client`."""
