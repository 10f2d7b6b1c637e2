"""Independent peers: programs that speak to our stack without sharing its code. Run them with `python -m`."""
