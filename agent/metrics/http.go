// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Server serves /metrics, /healthz and /readyz.
type Server struct {
	http     *http.Server
	listener net.Listener
	ready    atomic.Bool
}

// Serve starts the server on a; it answers until Close. /healthz says that
// the process lives; /readyz is 200 once SetReady(true) was called and nothing
// is Unhealthy, and lists what is wrong either way.
func (m *Metrics) Serve(a netip.AddrPort) (*Server, error) {
	l, err := net.Listen("tcp", a.String())
	if err != nil {
		return nil, fmt.Errorf("listen for metrics: %w; set listen.metrics", err)
	}
	s := &Server{listener: l}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { s.readyz(w, m.health) })
	s.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 15 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	go s.http.Serve(l) // returns at Close
	return s, nil
}

// SetReady says whether everything that policy asks for is in place.
func (s *Server) SetReady(ready bool) { s.ready.Store(ready) }

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Close ends the server; requests under way have until ctx ends.
func (s *Server) Close(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("stop metrics server: %w", err), s.http.Close())
	}
	return nil
}

func (s *Server) readyz(w http.ResponseWriter, h *Health) {
	type problem struct {
		Problem
		Severity string `json:"severity"`
	}
	worst, bad := h.Worst()
	body := struct {
		Ready    bool      `json:"ready"`
		Problems []problem `json:"problems"`
	}{Ready: s.ready.Load() && (!bad || worst < Unhealthy), Problems: []problem{}}
	for _, p := range h.Problems() {
		body.Problems = append(body.Problems, problem{p, p.Severity.String()})
	}
	w.Header().Set("Content-Type", "application/json")
	if !body.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(body) // the client is gone
}
