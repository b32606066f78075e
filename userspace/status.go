// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// maxBaselines bounds how many baselines a status lists.
const maxBaselines = 256

// Status is what the process says of itself: the JSON of a StatusReply.
type Status struct {
	Version   string               `json:"version"`
	Engine    netloop.Stats        `json:"engine"`
	Streams   int                  `json:"streams"`
	Decisions []DecisionCount      `json:"decisions"`
	Recalled  uint64               `json:"cachedAnswers,omitempty"` // that stood in for a stage
	Proxy     proxy.Stats          `json:"proxy"`
	Issuers   []token.IssuerStatus `json:"issuers"`
	Proofs    Proofs               `json:"proofs,omitzero"`
	Relations relation.Status      `json:"relations"`
	Leaves    []LeafStatus         `json:"leaves"`
	Obtained  []obtain.Status      `json:"obtained,omitempty"`
	Baselines []Baseline           `json:"baselines"`
	Budgets   []Budget             `json:"budgets,omitempty"`
	Resident  uint64               `json:"residentBytes"`
}

// DecisionCount is how many decisions ended alike.
type DecisionCount struct {
	Stage    string `json:"stage"`
	Reason   string `json:"reason,omitempty"`
	Effect   string `json:"effect"`
	Enforced bool   `json:"enforced"`
	Count    uint64 `json:"count"`
}

// Proofs are the used ones of DPoP and of signatures.
type Proofs struct {
	Remembered int    `json:"remembered"`
	Problem    string `json:"problem,omitempty"` // why none is taken
}

// LeafStatus is the certificate that one local identity has now.
type LeafStatus struct {
	ID         string    `json:"id"`
	Serial     string    `json:"serial,omitempty"`
	Thumbprint string    `json:"thumbprint,omitempty"` // SHA-256 of the DER, hex; x5t#S256 of RFC 8705 is the same in base64url
	NotAfter   time.Time `json:"notAfter,omitzero"`
	Error      string    `json:"error,omitempty"`
}

// Baseline is what the scorer knows of one endpoint.
type Baseline struct {
	API         string `json:"api"`
	Method      string `json:"method"`
	Template    string `json:"template"`
	Requests    int    `json:"requests"`
	Identities  int    `json:"identities"`
	Calibration int    `json:"calibration"`
}

// Budget is how a policy keeps its budget of false positives.
type Budget struct {
	API       string  `json:"api"`
	PerDay    float64 `json:"perDay"`
	Requests  float64 `json:"requestsPerDay"`
	Threshold float64 `json:"threshold"` // no action at a p-value above it
	Scored    uint64  `json:"scored"`
	Acted     uint64  `json:"acted"`
}

func (p *process) status(in *line.Incoming) error {
	s := Status{
		Version: p.version, Engine: p.engine.Stats(), Proxy: p.proxy.Stats(), Issuers: p.tokens.Status(time.Now()), Proofs: Proofs{p.tokens.Proofs().Len(), p.tokens.Proofs().Problem(time.Now())},
		Relations: p.relations.Status(), Obtained: p.obtained.Status(), Resident: resident(),
	}
	counters := p.pipeline.Counters()
	s.Streams, s.Recalled = counters.Streams, counters.Recalled
	for _, c := range counters.Decisions {
		s.Decisions = append(s.Decisions, DecisionCount{c.Stage.String(), string(c.Reason), c.Effect.String(), c.Enforced, c.Count})
	}
	for _, l := range p.leaves.Status() {
		one := LeafStatus{ID: l.ID, Serial: l.Serial, NotAfter: l.NotAfter, Error: l.Error}
		if leaf, err := p.leaves.Get(l.ID); err == nil {
			one.Thumbprint = fmt.Sprintf("%x", leaf.Thumbprint)
		}
		s.Leaves = append(s.Leaves, one)
	}
	for _, b := range p.anomalies.List() {
		if len(s.Baselines) == maxBaselines {
			break
		}
		s.Baselines = append(s.Baselines, Baseline{b.API, b.Method, b.Template, b.Requests, b.Identities, b.Calibration})
	}
	for _, b := range p.anomalies.Budgets() {
		if len(s.Budgets) == maxBaselines {
			break
		}
		s.Budgets = append(s.Budgets, Budget(b))
	}
	raw, err := json.Marshal(s)
	if err != nil {
		in.Refuse(err.Error())
		return fmt.Errorf("encode status: %w", err)
	}
	return in.Reply(&linepb.Message{Body: &linepb.Message_StatusReply{StatusReply: &linepb.StatusReply{Json: raw}}})
}

func (p *process) explain(in *line.Incoming, id string) error {
	reply := &linepb.ExplainReply{}
	if e, ok := p.pipeline.Explain(id); !ok {
		reply.Error = fmt.Sprintf("no trace of request %q: kept are those of the last few hundred refusals, and of the last few hundred allowed calls, %d a second", id, pipeline.KeptAllows)
	} else if raw, err := json.Marshal(e); err != nil {
		reply.Error = err.Error()
	} else {
		reply.Json = raw
	}
	return in.Reply(&linepb.Message{Body: &linepb.Message_ExplainReply{ExplainReply: reply}})
}

// resident is the process's resident memory in bytes, 0 where /proc does not
// say.
func resident() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}
