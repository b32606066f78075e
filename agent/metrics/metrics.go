// SPDX-License-Identifier: Apache-2.0

// Package metrics holds every metric's name, and what is wrong with the agent
// as values. Names begin with sallyport_ and end with their unit; each label
// takes its values from a list or has a bound, so that nothing that a caller
// or a workload sends can make series without end.
package metrics

import (
	"strings"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Sources are what is read at a scrape, by functions of the agent's other
// parts; a nil one is left out. They must not wait.
type Sources struct {
	Version string
	Health  *Health
	// Kernel is the counters of the kernel half: reason -> count.
	Kernel func() map[string]uint64
	// EventsLost and SamplesLost count what the ring buffers could not take.
	EventsLost, SamplesLost func() uint64
	Identities              func() int    // recognised workloads
	Netns                   func() int    // enforced namespaces
	Policies                func() int    // APIPolicies in force
	Generation              func() uint64 // of the policy set in force
	Revocations             func() int
	UserspaceUp             func() bool // its process runs and is ready
	ObservationsRefused     func() uint64
}

// Metrics are the agent's metrics. The counters may be used from any
// goroutine.
type Metrics struct {
	registry  *prometheus.Registry
	health    *Health
	decisions *prometheus.CounterVec
	refusals  *prometheus.CounterVec
	reasons   reasonLabels

	DecisionsLost     prometheus.Counter
	CachedAnswers     prometheus.Counter
	UserspaceRestarts prometheus.Counter
	PolicyErrors      prometheus.Counter
	lineRefusals      *prometheus.CounterVec
	dials             *prometheus.CounterVec
	DialSeconds       prometheus.Histogram
	SignSeconds       prometheus.Histogram
	verdicts          *prometheus.CounterVec
	connectionsClosed *prometheus.CounterVec
}

// New returns the metrics over src.
func New(src Sources) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), health: src.Health}
	if m.health == nil {
		m.health = NewHealth(nil)
	}
	m.counters()
	m.gauges(src)
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{Namespace: "sallyport"}),
		kernelCollector{src.Kernel},
	)
	return m
}

func (m *Metrics) counters() {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(25e-6, 4, 9)})
		m.registry.MustRegister(h)
		return h
	}
	m.decisions = vec("sallyport_decisions_total", "Decisions of the proxy. enforced is false where the mode let a refusal pass.", "effect", "stage", "enforced")
	m.refusals = vec("sallyport_refusals_total", "Refused requests and connections, and those that audit would refuse.", "reason")
	m.CachedAnswers = counter("sallyport_cached_answers_total", "Answers of a while ago that stood in for a stage that failed.")
	m.DecisionsLost = counter("sallyport_decision_records_lost_total", "Decision records that the proxy had to drop.")
	m.UserspaceRestarts = counter("sallyport_userspace_restarts_total", "Starts of the proxy's process after the first.")
	m.PolicyErrors = counter("sallyport_policy_loads_refused_total", "Policy sets that were not taken because of an error.")
	m.lineRefusals = vec("sallyport_line_refusals_total", "Requests of the proxy's process that the agent's own plan forbids.", "request")
	m.dials = vec("sallyport_dials_total", "Sockets dialled for the proxy.", "kind", "result")
	m.DialSeconds = histogram("sallyport_dial_seconds", "Time to make and tag a socket for the proxy.")
	m.SignSeconds = histogram("sallyport_sign_seconds", "Time to sign a workload's certificate.")
	m.verdicts = vec("sallyport_verdicts_total", "Verdicts given to the kernel.", "action")
	m.connectionsClosed = vec("sallyport_connections_closed_total", "Live sockets that the agent closed.", "reason")
}

func (m *Metrics) gauges(src Sources) {
	gauge := func(name, help string, f func() float64, labels prometheus.Labels) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, f))
	}
	count := func(name, help string, f func() int) {
		if f != nil {
			gauge(name, help, func() float64 { return float64(f()) }, nil)
		}
	}
	total := func(name, help string, f func() uint64) {
		if f != nil {
			m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f()) }))
		}
	}
	gauge("sallyport_build_info", "1, with the version as a label.", func() float64 { return 1 }, prometheus.Labels{"version": src.Version})
	for _, s := range Severities {
		gauge("sallyport_problems", "Present problems, as status lists them.", func() float64 { return m.health.count(s) }, prometheus.Labels{"severity": s.String()})
	}
	count("sallyport_workloads", "Recognised workloads.", src.Identities)
	count("sallyport_namespaces", "Network namespaces with listeners.", src.Netns)
	count("sallyport_policies", "APIPolicies in force.", src.Policies)
	count("sallyport_revocations", "Revocations that hold.", src.Revocations)
	if src.UserspaceUp != nil {
		gauge("sallyport_userspace_up", "1 while the proxy's process runs and is ready.", func() float64 {
			if src.UserspaceUp() {
				return 1
			}
			return 0
		}, nil)
	}
	if src.Generation != nil {
		gauge("sallyport_policy_generation", "Generation of the policy set in force.", func() float64 { return float64(src.Generation()) }, nil)
	}
	total("sallyport_kernel_events_lost_total", "Kernel events that the ring buffer had no room for.", src.EventsLost)
	total("sallyport_kernel_samples_lost_total", "Samples that the ring buffer had no room for.", src.SamplesLost)
	total("sallyport_observations_refused_total", "Observations too large to be kept or shown.", src.ObservationsRefused)
}

// Decided counts n decisions that ended alike. A reason, stage or effect that
// is not known is counted as other: decisions come from the proxy's process.
func (m *Metrics) Decided(effect, stage string, reason flow.Reason, enforced bool, n uint64) {
	e := "false"
	if enforced {
		e = "true"
	}
	m.decisions.WithLabelValues(known(effect), known(stage), e).Add(float64(n))
	if effect != flow.EffectAllow.String() {
		m.refusals.WithLabelValues(m.reasons.label(reason)).Add(float64(n))
	}
}

// LineRefused counts a request of the proxy's process that was refused; kind
// is the agent's own word for it.
func (m *Metrics) LineRefused(kind LineRequest) { m.lineRefusals.WithLabelValues(kind.String()).Inc() }

// LineRequest is what the proxy's process can ask of the agent.
type LineRequest uint8

// The requests.
const (
	LineDial LineRequest = iota
	LineSign
	LineVerdict
	LineOther
)

// String returns the request's word.
func (r LineRequest) String() string {
	switch r {
	case LineDial:
		return "dial"
	case LineSign:
		return "sign"
	case LineVerdict:
		return "verdict"
	}
	return "other"
}

// DialKind is why a socket is dialled.
type DialKind uint8

// The kinds, with the numbers of the line's DialKind.
const (
	DialApplication DialKind = iota + 1
	DialPeer
	DialPlain
)

// Dialled counts a dial.
func (m *Metrics) Dialled(kind DialKind, err error) {
	k, result := "other", "ok"
	switch kind {
	case DialApplication:
		k = "application"
	case DialPeer:
		k = "peer"
	case DialPlain:
		k = "plain"
	}
	if err != nil {
		result = "error"
	}
	m.dials.WithLabelValues(k, result).Inc()
}

// VerdictPut counts a verdict given to the kernel.
func (m *Metrics) VerdictPut(a flow.Action) { m.verdicts.WithLabelValues(known(a.String())).Inc() }

// ConnectionsClosed counts live sockets that were closed.
func (m *Metrics) ConnectionsClosed(reason flow.Reason, n int) {
	m.connectionsClosed.WithLabelValues(m.reasons.label(reason)).Add(float64(n))
}

func known(word string) string {
	if words[word] {
		return word
	}
	return "other"
}

// words are the effects, stages and actions that flow knows.
var words = func() map[string]bool {
	m := map[string]bool{}
	for e := flow.EffectAllow; e <= flow.EffectTerminate; e++ {
		m[e.String()] = true
	}
	for s := range flow.StageCount {
		m[s.String()] = true
	}
	for a := flow.ActionProxy; a <= flow.ActionDeny; a++ {
		m[a.String()] = true
	}
	return m
}()

// maxReasons bounds the label reason; package flow has about a hundred.
const maxReasons = 256

// reasonLabels bounds the label reason: words of a reason's form, and no more
// than maxReasons of them.
type reasonLabels struct {
	seen  sync.Map
	count atomic.Int32
}

func (l *reasonLabels) label(r flow.Reason) string {
	if _, ok := l.seen.Load(r); ok {
		return string(r)
	}
	if r == "" || len(r) > 32 || strings.Trim(string(r), "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
		return "other"
	}
	if l.count.Add(1) > maxReasons {
		l.count.Add(-1)
		return "other"
	}
	r = flow.Reason(strings.Clone(string(r)))
	if _, had := l.seen.LoadOrStore(r, struct{}{}); had {
		l.count.Add(-1)
	}
	return string(r)
}

// kernelCollector turns the kernel's counters into one metric.
type kernelCollector struct{ read func() map[string]uint64 }

var kernelDesc = prometheus.NewDesc("sallyport_kernel_events_total", "What the kernel half refused or noticed.", []string{"reason"}, nil)

// Describe implements prometheus.Collector.
func (kernelCollector) Describe(ch chan<- *prometheus.Desc) { ch <- kernelDesc }

// Collect implements prometheus.Collector.
func (k kernelCollector) Collect(ch chan<- prometheus.Metric) {
	if k.read == nil {
		return
	}
	for reason, n := range k.read() {
		ch <- prometheus.MustNewConstMetric(kernelDesc, prometheus.CounterValue, float64(n), reason)
	}
}
