// SPDX-License-Identifier: Apache-2.0

package trial

import "github.com/sallyport-dev/sallyport/userspace/flow"

// Peer is the caller as the pipeline sees it.
func (c *Resolved) Peer() flow.Peer { return c.peer }
