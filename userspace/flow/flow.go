// SPDX-License-Identifier: Apache-2.0

// Package flow holds the words of Sallyport as plain types: what a flow, an
// identity, a request, a decision, a verdict and a reason are. Every other
// package speaks in them; this one imports nothing of ours and does nothing.
package flow

import (
	"net/netip"
	"time"
)

// IdentityNumber is an identity's node-local number in the kernel maps.
// 0 is no identity. A number is never reused in one boot.
type IdentityNumber uint32

// Mode says what a refusal does. The numeric order is the order of
// strictness, so a ceiling is the smaller of two modes.
type Mode uint8

// The modes, from the softest to the strictest.
const (
	ModeObserve Mode = iota // everything passes, decisions are recorded
	ModeAudit               // everything passes, refusals are recorded as wouldDeny
	ModeEnforce             // refusals refuse
)

var modeNames = [...]string{"observe", "audit", "enforce"}

// String returns the mode as policies write it.
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return "unknown"
}

// ParseMode is the inverse of Mode.String.
func ParseMode(s string) (Mode, bool) {
	for i, n := range modeNames {
		if s == n {
			return Mode(i), true
		}
	}
	return ModeEnforce, false
}

// MinMode returns the softer of two modes: how a node-wide ceiling composes
// with a policy's own mode.
func MinMode(a, b Mode) Mode { return min(a, b) }

// Action is what the kernel does with a connection of a flow.
type Action uint8

// The actions of a verdict.
const (
	ActionProxy  Action = iota // send to the proxy: the default of what is claimed
	ActionDirect               // nothing more is added: decided by identity alone
	ActionDeny                 // refuse in connect
)

// String returns the action's word.
func (a Action) String() string {
	switch a {
	case ActionProxy:
		return "proxy"
	case ActionDirect:
		return "direct"
	case ActionDeny:
		return "deny"
	}
	return "unknown"
}

// Flow is one connection as the kernel sees it.
type Flow struct {
	Cookie      uint64         // socket cookie of the client's socket, 0 if it lives elsewhere
	NetnsCookie uint64         // netns of the end that lives on this node
	Source      netip.AddrPort // the true client
	Destination netip.AddrPort // the original destination
	Identity    IdentityNumber // of the workload that opened it, 0 if none
	Target      IdentityNumber // that the kernel took to serve the destination, 0 if it was not asked
	Mode        Mode           // in which the kernel held that workload
}

// Verdict is a decision as the kernel holds it.
type Verdict struct {
	Source           IdentityNumber
	SourceNetns      uint64 // netns cookie
	Destination      netip.AddrPort
	DestinationNetns uint64 // netns cookie of the server, ActionDirect only
	Action           Action
	Expires          time.Duration // from now, on CLOCK_BOOTTIME
}

// Channel says how the bytes of a request reached the proxy, which is what
// its source identity rests on.
type Channel uint8

// The channels, weakest first.
const (
	ChannelPlaintext Channel = iota // steered plaintext: no proof of any identity
	ChannelTLS                      // steered TLS, terminated here, client certificate verified
	ChannelTunnel                   // mTLS 1.3 tunnel, peer SVID verified
	ChannelKernel                   // same node: the kernel knows both ends
)

// String returns the channel's word, as the decision log writes it.
func (c Channel) String() string {
	switch c {
	case ChannelPlaintext:
		return "plaintext"
	case ChannelTLS:
		return "tls"
	case ChannelTunnel:
		return "tunnel"
	case ChannelKernel:
		return "kernel"
	}
	return "unknown"
}

// Peer is who calls, as far as the channel proves it.
type Peer struct {
	ID      string         // SPIFFE ID, "" if none was proven
	Number  IdentityNumber // on this node, 0 for a peer elsewhere
	Address netip.AddrPort // the true client's address
	Channel Channel
	// Thumbprints are the SHA-256 digests of the certificates that a
	// certificate-bound token (RFC 8705) may name: the peer's own on a TLS
	// channel, the live leaves of the source identity on the same node.
	Thumbprints [][32]byte
	Serial      string    // of the peer's certificate, hex, "" without one
	NotAfter    time.Time // the peer certificate's, zero without one
	Anchor      Anchor    // what the identity's key chain rests on
}

// Anchor says what an identity's chain of keys rests on.
type Anchor uint8

// The anchors, weakest first.
const (
	AnchorNone     Anchor = iota
	AnchorSoftware        // a CA key in an encrypted file
	AnchorTPM             // a CA key created in a TPM
)

// String returns the anchor's word, as the decision log writes it.
func (a Anchor) String() string {
	switch a {
	case AnchorSoftware:
		return "software"
	case AnchorTPM:
		return "tpm"
	}
	return "none"
}
