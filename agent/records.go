// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

// keptAllows is how many allowed calls a second are also kept for `observe`
// while nobody watches: those that can be explained. Refusals always are.
const keptAllows = pipeline.KeptAllows

// recordLog is the decision log: the records that userspace sends, one JSON
// object a line, and the same for who observes.
type recordLog struct {
	a *Agent

	mu     sync.Mutex
	out    io.Writer
	second time.Time
	kept   int
}

func newRecordLog(out io.Writer, a *Agent) *recordLog { return &recordLog{a: a, out: out} }

var allowed = []byte(`"decision":"allow"`)

// take logs a batch of records. They come from the process that parses what
// strangers send: what is not one line of JSON is dropped and counted.
func (l *recordLog) take(records [][]byte, lost uint64) {
	if lost > 0 {
		l.a.metrics.DecisionsLost.Add(float64(lost))
	}
	var batch bytes.Buffer
	for _, r := range records {
		if !oneLine(r) {
			l.a.metrics.DecisionsLost.Inc()
			continue
		}
		batch.Write(r)
		batch.WriteByte('\n')
		if !bytes.Contains(r, allowed) || l.keep() {
			l.publish(r)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.out.Write(batch.Bytes()); err != nil {
		l.a.metrics.DecisionsLost.Add(float64(len(records)))
	}
}

// oneLine says whether a record is an object on one line. What is in it is the
// word of the process that sent it, valid or not; what counts is that it cannot
// pass for another record.
func oneLine(r []byte) bool {
	if len(r) < 2 || r[0] != '{' || r[len(r)-1] != '}' || !utf8.Valid(r) {
		return false
	}
	for _, c := range r {
		if c < ' ' {
			return false
		}
	}
	return true
}

// write logs one record.
func (l *recordLog) write(record []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.out.Write(append(record, '\n')); err != nil {
		l.a.metrics.DecisionsLost.Inc()
	}
}

// keep says whether an allowed call is to be shown.
func (l *recordLog) keep() bool {
	if l.a.hub.Watching() {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().Truncate(time.Second)
	if !now.Equal(l.second) {
		l.second, l.kept = now, 0
	}
	l.kept++
	return l.kept <= keptAllows
}

func (l *recordLog) publish(raw []byte) {
	var r pipeline.Record
	if err := json.Unmarshal(raw, &r); err != nil {
		l.a.metrics.DecisionsLost.Inc()
		return
	}
	decision := r.Decision
	if r.WouldDeny {
		decision = "wouldDeny"
	}
	from := l.a.nameOf(r.Source)
	if from == "" {
		from = r.Client.String()
	}
	to := l.a.nameOf(r.Destination)
	if to == "" {
		to = r.Address.String()
	}
	l.a.hub.Publish(&controlpb.Observation{
		TimeUnixNs: r.Time.UnixNano(), Kind: "decision", From: from, To: to, Decision: decision,
		Reason: string(r.Reason), Stage: r.Stage, Method: r.Method, Path: r.Path, Policy: r.Policy, Json: raw,
	})
}

// process takes a line that the userspace process wrote: its log, which goes
// where the agent's goes. A line that is no log record is one of a panic.
func (l *recordLog) process(text string) {
	var fields map[string]any
	if json.Unmarshal([]byte(text), &fields) != nil {
		l.a.log.Error("userspace", "line", text)
		return
	}
	level := slog.LevelInfo
	message, _ := fields["msg"].(string)
	if word, ok := fields["level"].(string); !ok || level.UnmarshalText([]byte(word)) != nil {
		level = slog.LevelInfo
	}
	attrs := []slog.Attr{slog.String("process", "userspace")}
	for _, k := range slices.Sorted(maps.Keys(fields)) {
		if k != "time" && k != "level" && k != "msg" {
			attrs = append(attrs, slog.Any(k, fields[k]))
		}
	}
	l.a.log.LogAttrs(context.Background(), level, message, attrs...)
}

// nameOf returns NAMESPACE/NAME of a SPIFFE ID, or the ID where the plan does
// not know it.
func (a *Agent) nameOf(spiffeID string) string {
	if v := a.view.Load(); v != nil && spiffeID != "" {
		if id, _, ok := v.plan.Identity(spiffeID); ok {
			return id.FullName()
		}
	}
	return spiffeID
}
