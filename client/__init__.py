# SPDX-License-Identifier: Apache-2.0
"""What runs beside the private records; `respond` is the one door they leave by."""
