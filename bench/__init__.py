"""The benchmark: the translators beside direct TCP, HAProxy, nginx and socat on one topology, in one run."""
