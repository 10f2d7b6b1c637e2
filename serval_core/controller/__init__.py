"""The service controller: who offers which service where, and how hosts and service routers tell each other."""
