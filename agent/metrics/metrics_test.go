// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func get(t *testing.T, s *Server, path string) (int, string) {
	t.Helper()
	r, err := http.Get("http://" + s.Addr().String() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func serve(t *testing.T, src Sources) (*Metrics, *Server) {
	t.Helper()
	m := New(src)
	s, err := m.Serve(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		http.DefaultClient.CloseIdleConnections()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return m, s
}

func TestMetrics(t *testing.T) {
	seven := func() int { return 7 }
	nine := func() uint64 { return 9 }
	m, s := serve(t, Sources{
		Version: "1.2.3", Health: NewHealth(nil),
		Kernel:     func() map[string]uint64 { return map[string]uint64{"untagged": 3} },
		EventsLost: nine, SamplesLost: nine, Identities: seven, Netns: seven, Policies: seven, Generation: nine,
		Revocations: seven, ObservationsRefused: nine, UserspaceUp: func() bool { return true },
	})
	m.Decided("deny", "token", flow.ReasonTokenExpired, true, 1)
	m.Decided("allow", "made-up", "", true, 1)
	m.Decided("deny", "token", "<script>", false, 1)
	m.LineRefused(LineSign)
	m.Dialled(DialPeer, errors.New("x"))
	m.Dialled(DialKind(99), nil)
	m.VerdictPut(flow.ActionDirect)
	m.ConnectionsClosed(flow.ReasonRevoked, 2)
	m.DialSeconds.Observe(30e-6)
	m.health.Set("x", Degraded, "t", "r")
	_, got := get(t, s, "/metrics")
	for _, want := range []string{
		`sallyport_decisions_total{effect="deny",enforced="true",stage="token"} 1`,
		`sallyport_decisions_total{effect="allow",enforced="true",stage="other"} 1`,
		`sallyport_refusals_total{reason="token_expired"} 1`,
		`sallyport_refusals_total{reason="other"} 1`,
		`sallyport_line_refusals_total{request="sign"} 1`,
		`sallyport_dials_total{kind="peer",result="error"} 1`,
		`sallyport_dials_total{kind="other",result="ok"} 1`,
		`sallyport_verdicts_total{action="direct"} 1`,
		`sallyport_connections_closed_total{reason="revoked"} 2`,
		`sallyport_dial_seconds_count 1`,
		`sallyport_kernel_events_total{reason="untagged"} 3`,
		`sallyport_kernel_events_lost_total 9`, `sallyport_kernel_samples_lost_total 9`,
		`sallyport_workloads 7`, `sallyport_namespaces 7`, `sallyport_policies 7`, `sallyport_revocations 7`,
		`sallyport_policy_generation 9`, `sallyport_observations_refused_total 9`,
		`sallyport_problems{severity="degraded"} 1`, `sallyport_problems{severity="unhealthy"} 0`,
		`sallyport_userspace_up 1`, `sallyport_build_info{version="1.2.3"} 1`,
		`sallyport_userspace_restarts_total 0`, `sallyport_policy_loads_refused_total 0`, `sallyport_decision_records_lost_total 0`,
		`sallyport_process_resident_memory_bytes`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s", want)
		}
	}
	for line := range strings.Lines(got) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if !strings.HasPrefix(name, "sallyport_") && !strings.HasPrefix(name, "go_") {
			t.Errorf("a foreign name: %s", line)
		}
	}
}

func TestLabelsAreBounded(t *testing.T) {
	m := New(Sources{})
	for i := range 10 * maxReasons {
		m.Decided("deny", "token", flow.Reason(fmt.Sprintf("made_up_%d", i)), true, 1)
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "sallyport_refusals_total" && len(f.Metric) != maxReasons+1 {
			t.Errorf("%d series", len(f.Metric))
		}
	}
}

func TestHealthAndReadiness(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	h := NewHealth(func() time.Time { return now })
	_, s := serve(t, Sources{Health: h})
	status := func() (int, []string) {
		code, body := get(t, s, "/readyz")
		var v struct {
			Problems []struct{ ID, Severity, Text, Remedy string }
		}
		if err := json.Unmarshal([]byte(body), &v); err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, p := range v.Problems {
			ids = append(ids, p.ID+":"+p.Severity)
		}
		return code, ids
	}
	if code, _ := get(t, s, "/healthz"); code != 200 {
		t.Errorf("healthz %d", code)
	}
	if code, _ := status(); code != 503 {
		t.Errorf("before it is ready: %d", code)
	}
	s.SetReady(true)
	h.Set("b", Warning, "w", "do")
	now = now.Add(time.Second)
	h.Set("a", Degraded, "d", "do")
	h.Set("b", Warning, "changed", "do")
	if code, ids := status(); code != 200 || fmt.Sprint(ids) != "[a:degraded b:warning]" {
		t.Errorf("%d %v", code, ids)
	}
	h.Check("c", Unhealthy, errors.New("broken"), "mend it")
	if code, ids := status(); code != 503 || fmt.Sprint(ids) != "[c:unhealthy a:degraded b:warning]" {
		t.Errorf("%d %v", code, ids)
	}
	if p := h.Problems(); p[2].Text != "changed" || !p[2].Since.Equal(now.Add(-time.Second)) {
		t.Errorf("%+v", p[2])
	}
	h.Check("c", Unhealthy, nil, "")
	h.Clear("a")
	h.Clear("b")
	if code, ids := status(); code != 200 || len(ids) != 0 {
		t.Errorf("%d %v", code, ids)
	}
	for i := range 2 * maxProblems {
		h.Set(fmt.Sprint("n/", i), Degraded, "", "")
	}
	h.Set("worst", Unhealthy, "", "")
	if p := h.Problems(); len(p) != maxProblems+1 || p[0].ID != "worst" {
		t.Errorf("%d problems, first %s", len(p), p[0].ID)
	}
	if code, _ := get(t, s, "/other"); code != 404 {
		t.Errorf("other path: %d", code)
	}
}
