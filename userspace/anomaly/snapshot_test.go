// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func stored(t testing.TB) (dir string, data []byte) {
	t.Helper()
	dir = t.TempDir()
	s, err := New(Options{StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	o := newOrders(29)
	var sm Sample
	for i := range 300 {
		learn(s, &sm, ordersKey(200, 1), o.next(i), "spiffe://example.org/caller")
		learn(s, &sm, Key{API: "w", Method: "GET", Template: "/**"}, request("GET", "/reports/annual", "token=hunter2hunter2", i), "one")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err = os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	return dir, data
}

func TestSnapshot(t *testing.T) {
	dir, data := stored(t)
	s, err := New(Options{StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	var sm Sample
	if sc := score(s, &sm, ordersKey(200, 1), request("GET", "/v1/orders/1'--", "qty=3&color=red&note=no+hurry", 400)); !sc.Warm || sc.P > 0.02 {
		t.Errorf("after a restart: %+v", sc)
	}
	if sc := score(s, &sm, ordersKey(200, 1), newOrders(1).next(400)); sc.P < 0.02 {
		t.Errorf("a normal request after a restart: %+v", sc)
	}
	for _, secret := range []string{"hunter2", "leave at", "please", "spiffe://example.org/caller", "green"} {
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("the stored baselines hold %q", secret)
		}
	}
	if i, err := os.Stat(filepath.Join(dir, fileName)); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", i.Mode(), err)
	}
}

// TestDamaged damages the file in every way; each time it is set aside whole.
func TestDamaged(t *testing.T) {
	_, data := stored(t)
	flip := func(i int) []byte {
		d := bytes.Clone(data)
		d[i] ^= 1
		return d
	}
	for name, d := range map[string][]byte{
		"empty": {}, "magic": flip(0), "version": flip(len(fileMagic)), "sum": flip(len(fileMagic) + 5),
		"body": flip(len(data) / 2), "last": flip(len(data) - 1), "cut": data[:len(data)-1], "longer": append(bytes.Clone(data), 0),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			if err := os.WriteFile(path, d, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := New(Options{StateDir: dir})
			if !errors.Is(err, ErrDamaged) || s == nil {
				t.Fatalf("%v, scorer %v", err, s != nil)
			}
			if len(s.List()) != 0 {
				t.Error("half of it was loaded")
			}
			aside, err := os.ReadFile(path + ".damaged")
			if err != nil || !bytes.Equal(aside, d) {
				t.Errorf("not set aside: %v", err)
			}
			var sm Sample
			learn(s, &sm, ordersKey(10, 1), newOrders(1).next(0), "one")
			if err := s.Save(); err != nil {
				t.Fatal(err)
			}
			if s, err = New(Options{StateDir: dir}); err != nil || len(s.List()) != 1 {
				t.Errorf("after a new start: %v", err)
			}
		})
	}
}

func TestRunSaves(t *testing.T) {
	dir := t.TempDir()
	s, err := New(Options{StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, fileName)); err != nil {
		t.Error(err)
	}
	s.opt.StateDir = filepath.Join(dir, "gone")
	if err := s.Save(); err == nil {
		t.Error("saved into a folder that is not there")
	}
}

func FuzzSnapshot(f *testing.F) {
	_, data := stored(f)
	f.Add(data)
	f.Add([]byte(fileMagic))
	var paced paceState
	paced.days(0, 3, 100, who(3)...)
	empty := make([]byte, 8) // no space, no endpoint
	f.Add(appendFixed(append(order.AppendUint64(order.AppendUint32(empty, 1), 7), 1, 0, 'a'), &paced))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &Scorer{opt: Options{Now: time.Now}}
		s.clear(newSeed())
		r := &reader{b: data} // beyond the checksum, which a fuzzer does not pass
		s.decodeSpaces(r)
		s.decodeEndpoints(r)
		s.decodePaces(r)
		if r.err != nil {
			return
		}
		for _, p := range *s.paces.Load() {
			p.state.days(0, 2, 2, who(20)...)
		}
		var sm Sample
		learn(s, &sm, ordersKey(200, 1), newOrders(1).next(0), "one")
		s.List()
	})
}

func FuzzSample(f *testing.F) {
	f.Add("GET", "/v1/orders/1", "a=1&b=%41&&=&%zz=%", "application/json", []byte(`{"a":[1,{"b":"\u00e9\n"}],"c":null}`))
	f.Add("POST", "//x/0123456789abcdef", "a", "application/x-www-form-urlencoded", []byte("a=b&c"))
	f.Add("", "", "", "x/y+json", []byte(`[[[[[[[[[[[[[[[[[[[[1]`))
	f.Fuzz(func(t *testing.T, method, path, query, kind string, body []byte) {
		s := newScorer(t)
		r := &flow.Request{Method: method, Path: path, Query: query, Time: start, Body: body, ContentLength: int64(len(body)),
			Headers: []flow.Header{{Name: []byte("content-type"), Value: []byte(kind)}}}
		var sm, again Sample
		for _, template := range []string{"", "/**", "/v1/{a}/{b}"} {
			key := Key{API: "a", Method: method, Template: template, Warmup: Warmup{Requests: 2, Identities: 1}}
			for range 20 {
				sc := learn(s, &sm, key, r, "one")
				if !(sc.P > 0 && sc.P <= 1) || sc.Evidence != sc.Evidence {
					t.Fatalf("score %+v", sc)
				}
			}
			if sm.n > maxFeatures {
				t.Fatalf("%d features", sm.n)
			}
			s.Read(&again, key, r)
			if again.hash != sm.hash || again.n != sm.n {
				t.Fatal("the same request reads differently")
			}
		}
	})
}
