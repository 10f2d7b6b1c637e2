"""A TLS client over Serval. But for the line that makes the socket it is the client of any TCP service.

    python examples/tls_client.py 76568 certificate.pem service.example "a line"
"""

import ssl
import sys

from serval_core import sockets

service, certificate, name, line = sys.argv[1:5]
context = ssl.create_default_context(cafile=certificate)
connection = sockets.create_connection(service)
with context.wrap_socket(connection, server_hostname=name) as encrypted, encrypted.makefile("rwb") as stream:
    print(stream.readline().decode(), end="")
    stream.write(f"{line}\n".encode())
    stream.flush()
    print(stream.readline().decode(), end="")
    print(encrypted.version())
