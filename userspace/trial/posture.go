// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

// Posture describes what is known of a caller's node and program, in the
// words of a PostureProfile. What is not written is not known.
type Posture struct {
	// Evidence is who says so; absent: attested, the authority.
	Evidence string         `json:"evidence" oneof:"attested|claimed"`
	Node     *NodeFacts     `json:"node"`
	Binary   *BinaryFacts   `json:"binary"`
	Software *SoftwareFacts `json:"software"`
	Risk     string         `json:"risk" oneof:"low|medium|high"`
}

// NodeFacts are those of the caller's node.
type NodeFacts struct {
	// QuoteAge is how old the node's good TPM quote is.
	QuoteAge   *v1alpha1.Duration `json:"quoteAge"`
	SecureBoot *bool              `json:"secureBoot"`
	Lockdown   string             `json:"lockdown" oneof:"none|integrity|confidentiality"`
}

// BinaryFacts are those of the caller's program.
type BinaryFacts struct {
	Digest string `json:"digest" oneof:"unlisted|known|signed"`
	// ExecAfterConnect says whether the process ran another program after it
	// had opened the connection.
	ExecAfterConnect *bool `json:"execAfterConnect"`
	Privileged       *bool `json:"privileged"`
}

// SoftwareFacts are what statements about the program say.
type SoftwareFacts struct {
	// Provenance are the verified statements of who built it; one with an
	// empty builder stands for none.
	Provenance *Provenance `json:"provenance"`
	// SBOM is the bill of materials.
	SBOM *Bill `json:"sbom"`
	// Vulnerabilities are the known ones.
	Vulnerabilities *Vulnerabilities `json:"vulnerabilities"`
}

// Provenance is what is known of who built a program.
type Provenance struct {
	Builder string `json:"builder"` // "" for no statement at all
	Issuer  string `json:"issuer"`
}

// Bill is what is known of a bill of materials.
type Bill struct {
	Present bool               `json:"present"`
	Age     *v1alpha1.Duration `json:"age"`
}

// Vulnerabilities are what a scan found.
type Vulnerabilities struct {
	Found []Vulnerability `json:"found"`
}

// Vulnerability is a known one.
type Vulnerability struct {
	Severity string `json:"severity" required:"true" oneof:"low|medium|high|critical"`
	// NotLoaded says that it is in nothing that is loaded.
	NotLoaded bool `json:"notLoaded"`
	// NotAffected says that a statement (VEX) says so.
	NotAffected bool `json:"notAffected"`
	// Age is since its publication; absent: a year.
	Age *v1alpha1.Duration `json:"age"`
}

const (
	factTTL = time.Hour // of a described fact, from the call's time on
	year    = 365 * 24 * time.Hour
)

// facts are what the posture stage is given.
func (p *Posture) facts(now time.Time) *pipeline.Facts {
	if p == nil {
		return nil
	}
	f := &pipeline.Facts{}
	if n := p.Node; n != nil {
		if n.QuoteAge != nil {
			f.Quote = known(p, true, now)
			f.Quote.Measured = now.Add(-time.Duration(*n.QuoteAge))
			f.Quote.TTL = time.Duration(*n.QuoteAge) + factTTL
		}
		if n.SecureBoot != nil {
			f.SecureBoot = known(p, *n.SecureBoot, now)
		}
		if n.Lockdown != "" {
			f.Lockdown = known(p, level(n.Lockdown, "none", "integrity", "confidentiality"), now)
		}
	}
	if b := p.Binary; b != nil {
		if b.Digest != "" {
			f.Digest = known(p, level(b.Digest, "unlisted", "known", "signed"), now)
		}
		if b.ExecAfterConnect != nil {
			f.Exec = known(p, *b.ExecAfterConnect, now)
		}
		if b.Privileged != nil {
			f.Privileged = known(p, *b.Privileged, now)
		}
	}
	if p.Software != nil {
		p.software(f, now)
	}
	if p.Risk != "" {
		f.Risk = known(p, severity(p.Risk), now)
	}
	return f
}

func (p *Posture) software(f *pipeline.Facts, now time.Time) {
	s := p.Software
	if b := s.Provenance; b != nil {
		var all []pipeline.Build
		if b.Builder != "" {
			all = append(all, pipeline.Build{Builder: b.Builder, Issuer: b.Issuer})
		}
		f.Provenance = known(p, all, now)
	}
	if b := s.SBOM; b != nil {
		f.SBOM = known(p, pipeline.Bill{Present: b.Present, Made: now.Add(-age(b.Age, 0))}, now)
	}
	if s.Vulnerabilities == nil {
		return
	}
	var all []pipeline.Vulnerability
	for _, v := range s.Vulnerabilities.Found {
		all = append(all, pipeline.Vulnerability{Severity: severity(v.Severity), Loaded: !v.NotLoaded,
			NotAffected: v.NotAffected, Published: now.Add(-age(v.Age, year))})
	}
	f.Vulnerabilities = known(p, all, now)
}

func known[T any](p *Posture, v T, now time.Time) pipeline.Fact[T] {
	return pipeline.Fact[T]{Value: v, Source: "described", Measured: now, TTL: factTTL, Attested: p.Evidence != "claimed"}
}

func severity(word string) uint8 { return level(word, "low", "medium", "high", "critical") }

// level is the place of a word in an order, the lowest first.
func level(word string, words ...string) uint8 { return uint8(max(0, slices.Index(words, word))) }

func age(d *v1alpha1.Duration, otherwise time.Duration) time.Duration {
	if d == nil {
		return otherwise
	}
	return time.Duration(*d)
}
