// SPDX-License-Identifier: Apache-2.0

// Package appcerts keeps the certificates that applications are known by,
// where the callers' TLS ends at the proxy (app.tls: terminate, reencrypt), and
// the roots that they are believed by (reencrypt). The keys stay
// in the agent: the userspace process, which reads what callers send, gets the
// chains and asks for one signature a handshake.
package appcerts

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

// maxFile bounds a certificate's and a key's file, in bytes.
const maxFile = 64 << 10

// Source says where an application's certificate is.
type Source struct {
	API              string // NAMESPACE/NAME of the policy
	Certificate, Key string // absolute paths of PEM files
	CA               string // the same, "" where the application speaks no TLS
}

// Certificate is what callers of an API are shown, DER and leaf first, and the
// roots by which the application is believed, DER; Err says why something is
// not there.
type Certificate struct {
	API   string
	Chain [][]byte
	Roots [][]byte
	Err   error
}

// Store holds the certificates of the policies in force. It is safe for
// concurrent use.
type Store struct {
	now func() time.Time

	mu      sync.RWMutex
	entries map[string]*entry // by API
}

type entry struct {
	Source
	pair  *tls.Certificate // nil: none was ever good
	roots [][]byte         // the same
	err   error            // of the last read
}

// New returns an empty store. now is time.Now where it is nil.
func New(now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	return &Store{now: now, entries: map[string]*entry{}}
}

// Set replaces the sources, and reads those that are new.
func (s *Store) Set(list []Source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries := make(map[string]*entry, len(list))
	for _, src := range list {
		e := s.entries[src.API]
		if e == nil || e.Source != src {
			next := &entry{Source: src}
			if e != nil {
				// Until the new files have been good once. Another CA was named
				// because the one before is not to be believed any more.
				next.pair = e.pair
				if e.CA == src.CA {
					next.roots = e.roots
				}
			}
			e = next
			e.read(s.now())
		}
		entries[src.API] = e
	}
	s.entries = entries
}

// Reread reads the files again. What is not good any more changes nothing but
// the problem that is shown.
func (s *Store) Reread() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries {
		e.read(s.now())
	}
}

func (e *entry) read(now time.Time) {
	pair, err := load(e.Source, now)
	if pair != nil && (err == nil || e.pair == nil) { // nothing good gives way to what callers would not take
		e.pair = pair
	}
	if e.CA != "" {
		roots, caErr := loadRoots(e.Source)
		if caErr == nil {
			e.roots = roots
		}
		err = errors.Join(err, caErr)
	}
	e.err = err
}

// maxRoots bounds the certificates of a CA's file.
const maxRoots = 100

// loadRoots reads the certificates that an application is believed by.
func loadRoots(src Source) (roots [][]byte, err error) {
	info, err := os.Stat(src.CA)
	if err != nil {
		return nil, fmt.Errorf("read ca of %s: %w", src.API, err)
	}
	if info.Mode()&(fs.FileMode(0o002)) != 0 {
		return nil, fmt.Errorf("read ca of %s: everybody may change %s; chmod o-w it", src.API, src.CA)
	}
	rest, err := statefile.Read(src.CA, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read ca of %s: %w", src.API, err)
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("read ca of %s: %s holds a %q beside certificates", src.API, src.CA, block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("read ca of %s: %s: %w", src.API, src.CA, err)
		}
		if roots = append(roots, block.Bytes); len(roots) > maxRoots {
			return nil, fmt.Errorf("read ca of %s: %s holds more than %d certificates", src.API, src.CA, maxRoots)
		}
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("read ca of %s: %s holds no certificate", src.API, src.CA)
	}
	return roots, nil
}

// load reads a certificate and its key. An error with a pair is a warning.
func load(src Source, now time.Time) (*tls.Certificate, error) {
	chain, err := statefile.Read(src.Certificate, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read certificate of %s: %w", src.API, err)
	}
	info, err := os.Stat(src.Key)
	if err != nil {
		return nil, fmt.Errorf("read key of %s: %w", src.API, err)
	}
	if info.Mode()&(fs.FileMode(0o007)) != 0 {
		return nil, fmt.Errorf("read key of %s: everybody may read or change %s; chmod o-rwx it", src.API, src.Key)
	}
	key, err := statefile.Read(src.Key, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read key of %s: %w", src.API, err)
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("read certificate of %s: %s with %s: %w", src.API, src.Certificate, src.Key, err)
	}
	if err := identity.CheckKey(pair.Leaf.PublicKey); err != nil {
		return nil, fmt.Errorf("read certificate of %s: %s: %w", src.API, src.Certificate, err)
	}
	if err := usable(pair.Leaf, now); err != nil {
		return &pair, fmt.Errorf("certificate of %s: %s %w", src.API, src.Certificate, err)
	}
	return &pair, nil
}

// usable says why callers would not take a certificate.
func usable(leaf *x509.Certificate, now time.Time) error {
	switch {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("ended at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("begins at %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	case len(leaf.DNSNames)+len(leaf.IPAddresses) == 0:
		return errors.New("names no host")
	}
	return nil
}

// MaxTotal bounds the chains and roots of all APIs of a node, in bytes: they go
// to the userspace process in one message.
const MaxTotal = 256 << 10

var errTotal = fmt.Errorf("the certificates and roots of this node's policies have more than %d bytes together", MaxTotal)

func (e *entry) size() (n int) {
	for _, list := range [...][][]byte{e.roots, e.chain()} {
		for _, der := range list {
			n += len(der)
		}
	}
	return n
}

func (e *entry) chain() [][]byte {
	if e.pair == nil {
		return nil
	}
	return e.pair.Certificate
}

// Certificates returns what callers are shown, by API. Those beyond MaxTotal
// have nothing.
func (s *Store) Certificates() []Certificate {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Certificate, 0, len(s.entries))
	total := 0
	for _, api := range slices.Sorted(maps.Keys(s.entries)) {
		e := s.entries[api]
		if total += e.size(); total > MaxTotal {
			out = append(out, Certificate{API: api, Err: errTotal})
			continue
		}
		c := Certificate{API: api, Chain: e.chain(), Roots: e.roots}
		if e.pair == nil || e.CA != "" && e.roots == nil {
			c.Err = e.err
		}
		out = append(out, c)
	}
	return out
}

// Problem says what is wrong with the files.
func (s *Store) Problem() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var errs []error
	total := 0
	for _, api := range slices.Sorted(maps.Keys(s.entries)) {
		errs = append(errs, s.entries[api].err)
		total += s.entries[api].size()
	}
	if total > MaxTotal {
		errs = append(errs, errTotal)
	}
	return errors.Join(errs...)
}

// The content that a server signs in a TLS 1.3 handshake: RFC 8446, section
// 4.4.3.
var verifyPrefix = append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...)

var (
	errMessage = errors.New("sign for a handshake: it is not what a TLS 1.3 server signs")
	errHash    = errors.New("sign for a handshake: not an accepted hash")
)

// Sign signs for a handshake with the key of an API. It takes nothing but the
// CertificateVerify of a TLS 1.3 server, so that whoever asks can use the key
// for no other purpose. hash is 0 for Ed25519; pss asks for RSASSA-PSS, the
// only RSA signature of TLS 1.3.
func (s *Store) Sign(api string, message []byte, hash crypto.Hash, pss bool) ([]byte, error) {
	transcript, ok := bytes.CutPrefix(message, verifyPrefix)
	if !ok || len(transcript) != crypto.SHA256.Size() && len(transcript) != crypto.SHA384.Size() {
		return nil, errMessage
	}
	signer := s.signer(api)
	if signer == nil {
		return nil, fmt.Errorf("sign for a handshake: no certificate of %q", api)
	}
	var opts crypto.SignerOpts = hash
	switch signer.Public().(type) {
	case ed25519.PublicKey:
		if hash != 0 || pss {
			return nil, errHash
		}
		signature, err := signer.Sign(rand.Reader, message, opts)
		if err != nil {
			return nil, fmt.Errorf("sign for a handshake of %s: %w", api, err)
		}
		return signature, nil
	case *rsa.PublicKey:
		if !pss {
			return nil, errHash
		}
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	default:
		if pss {
			return nil, errHash
		}
	}
	if hash != crypto.SHA256 && hash != crypto.SHA384 && hash != crypto.SHA512 {
		return nil, errHash
	}
	h := hash.New()
	h.Write(message)
	signature, err := signer.Sign(rand.Reader, h.Sum(nil), opts)
	if err != nil {
		return nil, fmt.Errorf("sign for a handshake of %s: %w", api, err)
	}
	return signature, nil
}

func (s *Store) signer(api string) crypto.Signer {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if e := s.entries[api]; e != nil && e.pair != nil {
		signer, _ := e.pair.PrivateKey.(crypto.Signer) // all that X509KeyPair takes can sign
		return signer
	}
	return nil
}
