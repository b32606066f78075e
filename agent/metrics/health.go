// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// Severity says how bad a problem is.
type Severity uint8

// The severities.
const (
	Warning   Severity = iota // works, but somebody should know
	Degraded                  // something is not done that was asked for
	Unhealthy                 // not ready: what is enforced refuses
)

// Severities lists them, the mildest first.
var Severities = []Severity{Warning, Degraded, Unhealthy}

// String returns the severity's word.
func (s Severity) String() string {
	switch s {
	case Warning:
		return "warning"
	case Degraded:
		return "degraded"
	case Unhealthy:
		return "unhealthy"
	}
	return "unknown"
}

// Problem is one thing that is wrong, as status, /readyz and a metric show
// it.
type Problem struct {
	ID       string    `json:"id"` // stable, of a-z and "-"; what is beyond it ("netns-conflict/4711") tells instances apart
	Severity Severity  `json:"-"`
	Text     string    `json:"text"`
	Remedy   string    `json:"remedy"`
	Since    time.Time `json:"since"`
}

// maxProblems bounds what is kept; beyond it only what makes the agent
// unhealthy is taken in.
const maxProblems = 256

// Health is the set of present problems.
type Health struct {
	mu       sync.Mutex
	problems map[string]Problem
	now      func() time.Time
}

// NewHealth returns an empty set. now is nil for the system's clock.
func NewHealth(now func() time.Time) *Health {
	if now == nil {
		now = time.Now
	}
	return &Health{problems: map[string]Problem{}, now: now}
}

// Set raises a problem, or changes one that was raised. Since stays that of
// the first time.
func (h *Health) Set(id string, s Severity, text, remedy string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, had := h.problems[id]
	p := Problem{ID: id, Severity: s, Text: text, Remedy: remedy, Since: h.now()}
	if had {
		p.Since = old.Since
	} else if len(h.problems) >= maxProblems && s != Unhealthy {
		return
	}
	h.problems[id] = p
}

// Clear says that a problem is no more.
func (h *Health) Clear(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.problems, id)
}

// Check raises the problem where err is not nil, with the error as its text,
// and clears it otherwise.
func (h *Health) Check(id string, s Severity, err error, remedy string) {
	if err != nil {
		h.Set(id, s, err.Error(), remedy)
	} else {
		h.Clear(id)
	}
}

// Problems returns what is wrong now, worst and then oldest first.
func (h *Health) Problems() []Problem {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]Problem, 0, len(h.problems))
	for _, p := range h.problems {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(b.Severity, a.Severity), a.Since.Compare(b.Since), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// Worst returns the worst severity now; ok is false where nothing is wrong.
func (h *Health) Worst() (s Severity, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.problems {
		s, ok = max(s, p.Severity), true
	}
	return s, ok
}

func (h *Health) count(s Severity) float64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, p := range h.problems {
		if p.Severity == s {
			n++
		}
	}
	return float64(n)
}
