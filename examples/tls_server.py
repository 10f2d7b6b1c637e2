"""A TLS service for Serval with the standard library's ssl module: greets each client, and echoes one line.

    python examples/tls_server.py 76568 certificate.pem key.pem
"""

import ssl
import sys

from serval_core import sockets

context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(sys.argv[2], sys.argv[3])
listener = sockets.create_server(sys.argv[1])
print("serving", sys.argv[1], flush=True)
while True:
    connection, peer = listener.accept()
    with connection, context.wrap_socket(connection, server_side=True) as encrypted, encrypted.makefile("rwb") as stream:
        stream.write(f"hello {peer.address}\n".encode())
        stream.flush()
        stream.write(stream.readline())
