// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// TestCeilingComposes holds every mode under every ceiling: the kernel refuses
// where both are enforce, and else tells what enforce would have refused.
func TestCeilingComposes(t *testing.T) {
	modes := []flow.Mode{flow.ModeObserve, flow.ModeAudit, flow.ModeEnforce}
	n := newNode(t, flow.ModeEnforce)
	outside := netip.MustParseAddrPort("192.0.2.10:9999")
	l, err := n.server.Listen(outside)
	must(t, err)
	for _, mode := range modes {
		for _, ceiling := range modes {
			t.Run(fmt.Sprintf("%s under %s", mode, ceiling), func(t *testing.T) {
				s := n.state(mode)
				id := s.Identities[n.clientCgroup.ID]
				id.Flags = FlagEgressDeny
				s.Identities[n.clientCgroup.ID] = id
				must(t, n.Apply(s))
				must(t, n.SetCeiling(ceiling))
				enforced := mode == flow.ModeEnforce && ceiling == flow.ModeEnforce

				c, err := n.client.Dial(outside) // egress, at connect
				if refused := errors.Is(err, unix.EPERM); refused != enforced || err != nil && !refused {
					t.Errorf("connect: %v", err)
				}
				if e := n.event(t, flow.ReasonEgress); e.Enforced != enforced {
					t.Errorf("connect is told as %+v", e)
				}
				if err == nil {
					accepted, _, err := l.Accept()
					must(t, err)
					must(t, accepted.Close())
					must(t, c.Close())
				}

				squat, err := n.client.TCP(address4) // the bind guard
				must(t, err)
				defer squat.Close()
				err = squat.Bind(address4)
				if refused := errors.Is(err, unix.EPERM); refused != enforced || err != nil && !refused {
					t.Errorf("bind: %v", err)
				}
				if e := n.event(t, flow.ReasonBindGuard); e.Enforced != enforced {
					t.Errorf("bind is told as %+v", e)
				}
			})
		}
	}
}
