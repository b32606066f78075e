// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"net/netip"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Record is one decision as the decision log writes it, one JSON object a
// line. It never holds a path, a query, a header, a token or any other value
// of the request: only its method and the template of its path.
type Record struct {
	Time          time.Time      `json:"time"`
	RequestID     string         `json:"requestID,omitempty"`
	Node          string         `json:"node,omitempty"`
	Source        string         `json:"source,omitempty"`      // SPIFFE ID
	Destination   string         `json:"destination,omitempty"` // SPIFFE ID
	Client        netip.AddrPort `json:"client,omitzero"`
	Address       netip.AddrPort `json:"address,omitzero"` // that the client dialled
	Protocol      string         `json:"protocol"`
	Method        string         `json:"method,omitempty"`
	Path          string         `json:"path,omitempty"`    // template
	Upgrade       string         `json:"upgrade,omitempty"` // that was asked for: websocket
	Decision      string         `json:"decision"`          // flow.Effect
	Mode          string         `json:"mode"`
	WouldDeny     bool           `json:"wouldDeny,omitempty"`
	Stage         string         `json:"stage"`
	Policy        string         `json:"policy,omitempty"`
	Rule          string         `json:"rule,omitempty"`
	Position      string         `json:"position,omitempty"` // file:line
	Reason        flow.Reason    `json:"reason,omitempty"`
	Detail        string         `json:"detail,omitempty"`
	LatencyMicros int64          `json:"latencyMicros"`
	Channel       string         `json:"channel"` // assurance: how the identity was proven
	Anchor        string         `json:"anchor"`  // and what its keys rest on
	BytesIn       int64          `json:"bytesIn,omitempty"`
	BytesOut      int64          `json:"bytesOut,omitempty"`
}

// Outcome is what is known of a request beside its decision.
type Outcome struct {
	Destination *compile.Identity // the protected identity, nil if none
	Took        time.Duration     // from the request's head to the decision's effect
	// BytesIn and BytesOut went to and came from the application.
	BytesIn, BytesOut int64
}

const maxMethod = 32 // bytes of a method that are recorded

func (r *Record) fill(p *Pipeline, req *flow.Request, api *compile.API, d *flow.Decision, o *Outcome) {
	*r = Record{
		Time: req.Time, RequestID: req.ID, Node: p.opt.Node, Source: req.Peer.ID, Client: req.Peer.Address, Address: req.Destination,
		Protocol: req.Protocol.String(), Method: req.Method, Path: d.Template, Decision: d.Effect.String(), Mode: p.Mode(api).String(),
		WouldDeny: d.WouldDeny(), Stage: d.Stage.String(), Policy: d.Policy, Rule: d.Rule, Position: d.Position,
		Reason: d.Reason, Detail: d.Detail, LatencyMicros: o.Took.Microseconds(), Channel: req.Peer.Channel.String(),
		Anchor: req.Peer.Anchor.String(), BytesIn: o.BytesIn, BytesOut: o.BytesOut,
	}
	if req.Upgrade {
		r.Upgrade = "websocket"
	}
	if len(r.Method) > maxMethod {
		r.Method = r.Method[:maxMethod]
	}
	if o.Destination != nil {
		r.Destination = o.Destination.ID
	}
}

// Append appends the record as a JSON object without line end. It is what
// encoding/json would write, but for nothing allocated.
func (r *Record) Append(b []byte) []byte {
	b = append(b, `{"time":"`...)
	b = r.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, '"')
	b = appendText(b, "requestID", r.RequestID)
	b = appendText(b, "node", r.Node)
	b = appendText(b, "source", r.Source)
	b = appendText(b, "destination", r.Destination)
	b = appendAddress(b, "client", r.Client)
	b = appendAddress(b, "address", r.Address)
	b = appendText(b, "protocol", r.Protocol)
	b = appendText(b, "method", r.Method)
	b = appendText(b, "path", r.Path)
	b = appendText(b, "upgrade", r.Upgrade)
	b = appendText(b, "decision", r.Decision)
	b = appendText(b, "mode", r.Mode)
	if r.WouldDeny {
		b = append(b, `,"wouldDeny":true`...)
	}
	b = appendText(b, "stage", r.Stage)
	b = appendText(b, "policy", r.Policy)
	b = appendText(b, "rule", r.Rule)
	b = appendText(b, "position", r.Position)
	b = appendText(b, "reason", string(r.Reason))
	b = appendText(b, "detail", r.Detail)
	b = append(b, `,"latencyMicros":`...)
	b = strconv.AppendInt(b, r.LatencyMicros, 10)
	b = appendText(b, "channel", r.Channel)
	b = appendText(b, "anchor", r.Anchor)
	b = appendCount(b, "bytesIn", r.BytesIn)
	b = appendCount(b, "bytesOut", r.BytesOut)
	return append(b, '}')
}

func appendText(b []byte, name, v string) []byte {
	if v == "" {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':')
	return appendQuoted(b, v)
}

func appendCount(b []byte, name string, v int64) []byte {
	if v == 0 {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':')
	return strconv.AppendInt(b, v, 10)
}

func appendAddress(b []byte, name string, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, `":"`...)
	b = a.AppendTo(b)
	return append(b, '"')
}

const hexDigits = "0123456789abcdef"

// appendQuoted writes a JSON string, RFC 8259 section 7. Control characters
// and what is not UTF-8 are escaped or replaced, so a record is always one
// line of text.
func appendQuoted(b []byte, v string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(v); {
		c := v[i]
		if c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			b = append(b, v[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			default:
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
			i++
			start = i
			continue
		}
		r, n := utf8.DecodeRuneInString(v[i:])
		if r == utf8.RuneError && n == 1 || r == '\u2028' || r == '\u2029' {
			b = append(b, v[start:i]...)
			b = append(b, `\ufffd`...)
			i += n
			start = i
			continue
		}
		i += n
	}
	b = append(b, v[start:]...)
	return append(b, '"')
}

// Record notes a decision: it counts it, queues its record for the agent and
// keeps it, with its trace, where it can be explained. Every decision is
// recorded once, also those that were not taken by Decide. req's strings may
// be its buffer's: nothing of them is kept but copies.
func (l *Loop) Record(req *flow.Request, api *compile.API, d *flow.Decision, o Outcome) {
	l.counts.add(d, o.Took)
	r := &l.scratch
	r.fill(l.p, req, api, d, &o)
	refusal := d.Effect != flow.EffectAllow
	l.queue.put(r, refusal)
	switch {
	case refusal:
		l.refused.put(r, d.Steps)
	case len(d.Steps) > 0 && (l.kept < KeptAllows || l.p.tracing.Load()):
		l.kept++
		l.allowed.put(r, d.Steps)
	}
	select {
	case l.p.wake <- struct{}{}:
	default:
	}
}
