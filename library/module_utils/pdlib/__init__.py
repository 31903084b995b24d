"""The pure logic of the project: variables, topology, plan, units; and the little that modules do on hosts.

Stdlib only and Python 3.9-compatible, because Ansible ships it to hosts inside modules.
"""
