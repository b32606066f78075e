// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
// the normal requests is learned, the second half and the attacks are scored;
// then once more with one learned request in a hundred replaced by an attack.
func TestCSIC(t *testing.T) {
	dir := os.Getenv(csicEnv)
	if dir == "" {
		t.Skipf("%s does not name the folder of the CSIC 2010 set", csicEnv)
	}
	normal := readRequests(t, filepath.Join(dir, "normal.txt.gz"))
	attacks := readRequests(t, filepath.Join(dir, "anomalous.txt.gz"))
	for _, c := range []struct {
		name       string
		num, denom int
		poison     int // one in so many, 0: none
	}{{"half", 1, 2, 0}, {"three quarters", 3, 4, 0}, {"half, 1 % poison", 1, 2, 100}} {
		t.Run(c.name, func(t *testing.T) { measure(t, normal, attacks, len(normal)*c.num/c.denom, c.poison) })
	}
}

func measure(t *testing.T, normal, attacks []flow.Request, half, poison int) {
	s := newScorer(t)
	key := func(r *flow.Request) Key {
		return Key{API: "shop/store", Method: r.Method, Template: "/**", Warmup: Warmup{Requests: 200, Identities: 3}}
	}
	var sm Sample
	known := map[string]bool{}
	text := func(r *flow.Request) string { return r.Method + r.Path + "?" + r.Query }
	for i := range normal[:half] {
		r := &normal[i]
		if poison > 0 && i%poison == poison/2 {
			r = &attacks[i*37%len(attacks)]
		}
		known[text(r)] = true
		learn(s, &sm, key(r), r, fmt.Sprint("client-", i%5))
	}
	var all, fresh, length []judged
	realised := map[float64]int{0.01: 0, 0.05: 0}
	add := func(r *flow.Request, attack bool) {
		sc := score(s, &sm, key(r), r)
		j := judged{sc.P, sc.Evidence, attack}
		all = append(all, j)
		if attack || !known[text(r)] {
			fresh = append(fresh, j)
		}
		length = append(length, judged{0, float64(len(r.Path) + len(r.Query)), attack})
		for a := range realised {
			if !attack && sc.P <= a {
				realised[a]++
			}
		}
	}
	for i := range normal[half:] {
		add(&normal[half+i], false)
	}
	for i := range attacks {
		if poison == 0 || !known[text(&attacks[i])] {
			add(&attacks[i], true)
		}
	}
	show := func(name string, js []judged, byP bool) {
		js = slices.Clone(js)
		for i := range js {
			if !byP {
				js[i].p = 0
			}
		}
		a, tpr := auc(js)
		t.Logf("%-36s AUC %.4f  TPR@1%% %.3f  TPR@0.1%% %.3f", name, a, tpr(0.01), tpr(0.001))
	}
	show("all, by evidence", all, false)
	show("all, by P", all, true)
	show("never-seen normals, by evidence", fresh, false)
	show("length alone (baseline)", length, false)
	for _, a := range []float64{0.05, 0.01} {
		t.Logf("P <= %.2f: realised/nominal false positives %.2f, attacks %.3f", a,
			float64(realised[a])/float64(len(normal)-half)/a, share(all, a))
	}
}

// share is that of the attacks whose P is at most a.
func share(all []judged, a float64) float64 {
	caught, attacks := 0, 0
	for _, j := range all {
		if j.attack {
			attacks++
			if j.p <= a {
				caught++
			}
		}
	}
	return float64(caught) / float64(attacks)
}
