// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxAddresses bounds what one namespace may have; a namespace of its own can
// be filled by whoever has CAP_NET_ADMIN in it.
const maxAddresses = 4096

// Addresses lists the unicast addresses of the namespace, sorted. Those that
// are not usable yet (IPv6 duplicate detection) are among them.
func (n *Netns) Addresses() ([]netip.Addr, error) {
	h, err := n.netlink()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return n.addresses(h)
}

// netlink opens a route socket inside the namespace.
func (n *Netns) netlink() (h *netlink.Handle, err error) {
	err = n.In(func() error {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink in netns %s: %w", n.name, err)
	}
	return h, nil
}

func (n *Netns) addresses(h *netlink.Handle) ([]netip.Addr, error) {
	list, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of netns %s: %w", n.name, err)
	}
	if len(list) > maxAddresses {
		return nil, fmt.Errorf("list addresses of netns %s: %d, at most %d", n.name, len(list), maxAddresses)
	}
	all := make([]netip.Addr, 0, len(list))
	for _, l := range list {
		if a, ok := netip.AddrFromSlice(l.IP); ok {
			all = append(all, a.Unmap())
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all), nil
}

// WatchAddresses calls f with the addresses, and again whenever they have
// changed, until ctx ends or they cannot be had any more.
func (n *Netns) WatchAddresses(ctx context.Context, f func([]netip.Addr)) error {
	h, err := n.netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	var last []netip.Addr
	for first := true; ; first = false {
		// Subscribed before they are listed: what changes in between is told.
		err := n.watch(ctx, func() error {
			now, err := n.addresses(h)
			if err == nil && (first || !slices.Equal(now, last)) {
				first, last = false, now
				f(now)
			}
			return err
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		// The subscription broke (too many changes at once): list again.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// watch runs one subscription: changed at its start and after each change.
func (n *Netns) watch(ctx context.Context, changed func() error) error {
	updates, done := make(chan netlink.AddrUpdate, 64), make(chan struct{})
	defer func() {
		close(done)
		for range updates { // its sender must not be left waiting
		}
	}()
	err := n.In(func() error {
		return netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{ErrorCallback: func(error) {}})
	})
	if err != nil {
		close(updates)
		return fmt.Errorf("watch addresses of netns %s: %w", n.name, err)
	}
	for {
		if err := changed(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-updates:
			if !ok {
				return nil
			}
		}
		for len(updates) > 0 { // one look for a burst of changes
			<-updates
		}
	}
}
