"""Compare arms of a calibration over several seeds: `srcfast study CONFIG.yaml`."""
