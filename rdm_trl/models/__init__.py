# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
