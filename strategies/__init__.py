# SPDX-License-Identifier: Apache-2.0
"""Methods, one file each; what several share lies in `parts`. Knows no runtime."""
