// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// csicEnv names the folder of the CSIC 2010 set: normal.txt.gz in time order
// and anomalous.txt.gz, one request a line, method and target.
const csicEnv = "SALLYPORT_CSIC"

func readRequests(t testing.TB, path string) []flow.Request {
	f, err := os.Open(path)
	if err != nil {
		t.Skipf("the set lacks %s: %v", path, err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var out []flow.Request
	sc := bufio.NewScanner(z)
	sc.Buffer(nil, 1<<20)
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for sc.Scan() {
		method, target, ok := strings.Cut(sc.Text(), " ")
		if !ok {
			continue
		}
		target = strings.TrimPrefix(target, "http://localhost:8080")
		path, query, _ := strings.Cut(target, "?")
		out = append(out, flow.Request{Method: strings.ToUpper(method), Path: path, Query: query, Time: now})
		now = now.Add(time.Second)
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

// judged is one score; greater is more anomalous.
type judged struct {
	p, evidence float64
	attack      bool
	index       int
}

func auc(all []judged) (auc float64, tpr func(fpr float64) float64) {
	sort.SliceStable(all, func(i, j int) bool {
		if all[i].p != all[j].p {
			return all[i].p < all[j].p
		}
		return all[i].evidence > all[j].evidence
	})
	var attacks, normals float64
	for _, j := range all {
		if j.attack {
			attacks++
		} else {
			normals++
		}
	}
	type point struct{ f, t float64 }
	curve := []point{{}}
	var f, t, area float64
	for i := 0; i < len(all); {
		k := i
		f0, t0 := f, t
		for k < len(all) && all[k].p == all[i].p && all[k].evidence == all[i].evidence {
			if all[k].attack {
				t++
			} else {
				f++
			}
			k++
		}
		area += (f - f0) / normals * (t0 + t) / 2 / attacks
		curve = append(curve, point{f / normals, t / attacks})
		i = k
	}
	return area, func(fpr float64) float64 {
		best := 0.0
		for _, c := range curve {
			if c.f <= fpr {
				best = max(best, c.t)
			}
		}
		return best
	}
}

// TestCSIC measures detection one-class and split in time: the first half of
// the normal requests is learned, the second half and the attacks are scored.
func TestCSIC(t *testing.T) {
	dir := os.Getenv(csicEnv)
	if dir == "" {
		t.Skipf("%s does not name the folder of the CSIC 2010 set", csicEnv)
	}
	normal := readRequests(t, filepath.Join(dir, "normal.txt.gz"))
	attacks := readRequests(t, filepath.Join(dir, "anomalous.txt.gz"))
	s, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := func(r *flow.Request) Key {
		return Key{API: "shop/store", Method: r.Method, Template: "/**", Warmup: Warmup{Requests: 200, Identities: 3}}
	}
	var sm Sample
	half := len(normal) / 2
	for i := range normal[:half] {
		r := &normal[i]
		s.Read(&sm, key(r), r)
		s.Score(&sm)
		s.Learn(&sm, fmt.Sprint("client-", i%5))
	}
	known := map[string]bool{}
	for i := range normal[:half] {
		known[normal[i].Method+normal[i].Path+"?"+normal[i].Query] = true
	}
	var all, fresh, length []judged
	realised := map[float64]int{0.01: 0, 0.05: 0}
	tests := 0
	score := func(r *flow.Request, attack bool, index int) {
		s.Read(&sm, key(r), r)
		sc := s.Score(&sm)
		j := judged{sc.P, sc.Evidence, attack, index}
		all = append(all, j)
		if attack || !known[r.Method+r.Path+"?"+r.Query] {
			fresh = append(fresh, j)
		}
		length = append(length, judged{0, float64(len(r.Path) + len(r.Query)), attack, index})
		if !attack {
			tests++
			for a := range realised {
				if sc.P <= a {
					realised[a]++
				}
			}
		}
	}
	for i := half; i < len(normal); i++ {
		score(&normal[i], false, i)
	}
	for i := range attacks {
		score(&attacks[i], true, i)
	}
	show := func(name string, js []judged) {
		a, tpr := auc(js)
		t.Logf("%-28s AUC %.4f  TPR@1%% %.3f  TPR@0.1%% %.3f", name, a, tpr(0.01), tpr(0.001))
	}
	show("all", all)
	show("never-seen normals", fresh)
	raw := append([]judged(nil), all...)
	for i := range raw {
		raw[i].p = 0
	}
	show("all, by evidence alone", raw)
	show("length alone (baseline)", length)
	for _, a := range []float64{0.05, 0.01} {
		t.Logf("false positives at p <= %.2f: realised/nominal %.2f", a, float64(realised[a])/float64(tests)/a)
	}
	for _, a := range []float64{0.05, 0.02, 0.01} {
		caught, attacks := 0, 0
		for _, j := range all {
			if j.attack {
				attacks++
				if j.p <= a {
					caught++
				}
			}
		}
		t.Logf("attacks with p <= %.2f: %.3f", a, float64(caught)/float64(attacks))
	}
}
