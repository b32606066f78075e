// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
)

// doneScript makes wrk print what it found as one JSON object. It changes no
// request, so wrk sends them as it does without a script.
const doneScript = `done = function(s, l, r)
  local e = s.errors
  io.write(string.format('{"requests":%d,"micros":%d,"errors":%d,"p50":%.1f,"p99":%.1f}\n',
    s.requests, s.duration, e.connect + e.read + e.write + e.status + e.timeout, l:percentile(50), l:percentile(99)))
end
`

// load that wrk makes.
type wrk struct {
	url         string
	connections int
	seconds     int
	header      []string
}

// found is what wrk saw.
type found struct {
	Requests int64   `json:"requests"`
	Micros   int64   `json:"micros"`
	Errors   int64   `json:"errors"` // connections, reads, writes, statuses, time-outs
	P50      float64 `json:"p50"`    // us
	P99      float64 `json:"p99"`    // us
}

func (f *found) perSecond() float64 { return float64(f.Requests) / (float64(f.Micros) / 1e6) }

// run runs wrk in a namespace and cgroup, and returns with what it saw the
// CPU time that it took itself.
func (w wrk) run(ctx context.Context, l *lab.Lab, space, cgroup string) (found, time.Duration, error) {
	threads := min(w.connections, 2)
	args := []string{"wrk", "-t", fmt.Sprint(threads), "-c", fmt.Sprint(w.connections), "-d", fmt.Sprintf("%ds", w.seconds),
		"--timeout", "5s", "-s", filepath.Join(l.Dir, "done.lua")}
	for _, h := range w.header {
		args = append(args, "-H", h)
	}
	var f found
	b, p, err := output(ctx, l, space, cgroup, append(args, w.url)...)
	if err != nil {
		return f, 0, err
	}
	if i := lastLine(b); json.Unmarshal(b[i:], &f) != nil {
		return f, 0, fmt.Errorf("read what wrk found: %q", b)
	}
	return f, p.CPU(), nil
}

// lastLine is where the last line of b begins.
func lastLine(b []byte) int {
	for i := len(b) - 2; i >= 0; i-- {
		if b[i] == '\n' {
			return i + 1
		}
	}
	return 0
}

// output runs a program to its end and returns its standard output.
func output(ctx context.Context, l *lab.Lab, space, cgroup string, argv ...string) ([]byte, *lab.Process, error) {
	f, err := os.CreateTemp(l.Dir, "output-")
	if err != nil {
		return nil, nil, fmt.Errorf("make file for output: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	p, err := l.Start(space, cgroup, filepath.Base(argv[0]), f, argv...)
	if err != nil {
		return nil, nil, err
	}
	select {
	case <-p.Done:
	case <-ctx.Done():
		p.Kill()
		return nil, nil, ctx.Err()
	}
	if p.Err != nil {
		return nil, nil, fmt.Errorf("run %s: %w: %s", argv[0], p.Err, p.LastLines(3))
	}
	b, err := os.ReadFile(f.Name())
	return b, p, err
}
