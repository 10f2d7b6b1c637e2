"""The embedded Serval stack. Start at `stack.ServalStack`; the protocol itself is `sal.ServiceAccessLayer`."""
