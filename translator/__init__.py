"""The appliance: legacy TCP on one side, the embedded Serval stack on the other, splice(2) between."""
