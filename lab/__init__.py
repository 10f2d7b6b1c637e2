"""The laboratory: hosts made of network namespaces, traffic for them, faults between them."""
