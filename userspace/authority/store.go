// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

// Bounds of the store.
const (
	MinTokenTTL = time.Minute
	MaxTokenTTL = 7 * 24 * time.Hour
	maxTokens   = 4096
	maxNodes    = 4096
	maxRecord   = 64 << 10
	keepUsed    = 24 * time.Hour
	// repeatTime is for how long the key that used a token may present it
	// again: an answer that was lost on the way must not cost a new token.
	repeatTime = 2 * time.Minute
)

// TokenInfo is what the authority knows of a join token; the secret is not
// among it.
type TokenInfo struct {
	ID      string    `json:"id"`
	Node    string    `json:"node"`
	IDs     []string  `json:"ids"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// NodeInfo is the authority's view of one node. Its IDs are what the next
// renewal lets it issue.
type NodeInfo struct {
	Node    string    `json:"node"`
	IDs     []string  `json:"ids"`
	Key     string    `json:"key"`    // SHA-256 of its SubjectPublicKeyInfo, hex
	Serial  string    `json:"serial"` // of its latest intermediate, "" before the first
	Joined  time.Time `json:"joined"`
	Renewed time.Time `json:"renewed"`
}

// Store is an authority's state on disk: join tokens, by hash, and nodes.
// Commands and the running server use it at the same time; each change is
// one renamed file under a lock.
type Store struct {
	dir         string
	trustDomain string
	now         func() time.Time
}

// tokenRecord is a token's file.
type tokenRecord struct {
	TokenInfo
	Hash string     `json:"hash"`           // SHA-256 of the secret, hex
	Key  string     `json:"key,omitempty"`  // of the node that used it
	Used *time.Time `json:"used,omitempty"` // when
}

// OpenStore opens or makes the store in the authority's state directory.
func OpenStore(dir, trustDomain string) (*Store, error) {
	if err := identity.CheckTrustDomain(trustDomain); err != nil {
		return nil, fmt.Errorf("open authority store: %w", err)
	}
	for _, sub := range []string{"", "tokens", filepath.Join("tokens", "used"), "nodes"} {
		if err := statefile.MakeDir(filepath.Join(dir, sub)); err != nil {
			return nil, fmt.Errorf("open authority store: %w", err)
		}
	}
	return &Store{dir: dir, trustDomain: trustDomain, now: time.Now}, nil
}

func (s *Store) tokenFile(id string) string { return filepath.Join(s.dir, "tokens", id+".json") }
func (s *Store) usedFile(id string) string  { return filepath.Join(s.dir, "tokens", "used", id+".json") }
func (s *Store) nodeFile(node string) string {
	return filepath.Join(s.dir, "nodes", node+".json")
}

// lock excludes other changes, of this process and of others.
func (s *Store) lock() (unlock func(), err error) {
	return statefile.Lock(filepath.Join(s.dir, "lock"))
}

// scope validates what a node is to issue.
func (s *Store) scope(node string, ids []string) (identity.Scope, error) {
	scope, err := identity.NewScope(s.trustDomain, node, ids)
	if err != nil {
		return identity.Scope{}, err
	}
	for _, text := range scope.IDs {
		if id, err := identity.ParseID(text); err != nil || strings.HasPrefix(id.Path(), reservedPath) {
			return identity.Scope{}, fmt.Errorf("scope of node %s: %q is reserved for Sallyport itself", node, text)
		}
	}
	return scope, nil
}

// add stores a new token.
func (s *Store) add(t Token, node string, ids []string, ttl time.Duration) (TokenInfo, error) {
	scope, err := s.scope(node, ids)
	if err != nil {
		return TokenInfo{}, fmt.Errorf("create join token: %w", err)
	}
	if len(scope.IDs) == 0 {
		return TokenInfo{}, fmt.Errorf("create join token: node %s would issue nothing; name at least one SPIFFE ID", node)
	}
	if ttl < MinTokenTTL || ttl > MaxTokenTTL {
		return TokenInfo{}, fmt.Errorf("create join token: a lifetime of %v is not between %v and %v", ttl, MinTokenTTL, MaxTokenTTL)
	}
	unlock, err := s.lock()
	if err != nil {
		return TokenInfo{}, err
	}
	defer unlock()
	if err := s.sweep(); err != nil {
		return TokenInfo{}, err
	}
	if n, err := count(filepath.Join(s.dir, "tokens")); err != nil {
		return TokenInfo{}, fmt.Errorf("create join token: %w", err)
	} else if n >= maxTokens {
		return TokenInfo{}, fmt.Errorf("create join token: %d are open, which is all there may be; revoke some", n)
	}
	now, hash := s.now(), t.hash()
	info := TokenInfo{ID: t.ID(), Node: node, IDs: scope.IDs, Created: now, Expires: now.Add(ttl)}
	if err := writeRecord(s.tokenFile(t.ID()), tokenRecord{TokenInfo: info, Hash: hex.EncodeToString(hash[:])}); err != nil {
		return TokenInfo{}, fmt.Errorf("store join token: %w", err)
	}
	return info, nil
}

// Tokens lists the tokens that were not used and have not expired.
func (s *Store) Tokens() ([]TokenInfo, error) {
	var list []TokenInfo
	err := eachRecord(filepath.Join(s.dir, "tokens"), func(r tokenRecord) {
		if s.now().Before(r.Expires) {
			list = append(list, r.TokenInfo)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list join tokens: %w", err)
	}
	return list, nil
}

// RevokeToken voids a token that was not used yet.
func (s *Store) RevokeToken(id string) error {
	if len(id) != sha256.Size || strings.Trim(id, "0123456789abcdef") != "" {
		return fmt.Errorf("revoke join token: %.70q is not a token's id; `sallyport authority token list` prints them", id)
	}
	err := os.Remove(s.tokenFile(id))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("revoke join token %s: there is none; was it used already?", id)
	}
	if err != nil {
		return fmt.Errorf("revoke join token: %w", err)
	}
	return nil
}

// claim uses a token for the node whose key has that hash, once, and enters
// the node. The rename decides between two that come at the same time.
func (s *Store) claim(t Token, key string) (identity.Scope, error) {
	unlock, err := s.lock()
	if err != nil {
		return identity.Scope{}, err
	}
	defer unlock()
	now := s.now()
	r, err := readRecord[tokenRecord](s.tokenFile(t.ID()))
	if errors.Is(err, fs.ErrNotExist) {
		return s.repeat(t, key, now)
	}
	if err != nil {
		return identity.Scope{}, err
	}
	if !r.matches(t) || !now.Before(r.Expires) {
		return identity.Scope{}, refuseToken("unknown or expired")
	}
	scope, err := s.scope(r.Node, r.IDs)
	if err != nil {
		return identity.Scope{}, err
	}
	if _, err := os.Lstat(s.nodeFile(r.Node)); errors.Is(err, fs.ErrNotExist) {
		if n, err := count(filepath.Join(s.dir, "nodes")); err != nil {
			return identity.Scope{}, fmt.Errorf("enrol node %s: %w", r.Node, err)
		} else if n >= maxNodes {
			return identity.Scope{}, fmt.Errorf("enrol node %s: %d are enrolled, which is all there may be; remove some", r.Node, n)
		}
	}
	if err := os.Rename(s.tokenFile(t.ID()), s.usedFile(t.ID())); err != nil {
		return identity.Scope{}, refuseToken("used at the same moment")
	}
	if err := statefile.SyncDir(filepath.Join(s.dir, "tokens")); err != nil {
		return identity.Scope{}, fmt.Errorf("store used join token: %w", err)
	}
	r.Key, r.Used = key, &now
	if err := writeRecord(s.usedFile(t.ID()), r); err != nil {
		return identity.Scope{}, fmt.Errorf("store used join token: %w", err)
	}
	node := NodeInfo{Node: r.Node, IDs: scope.IDs, Key: key, Joined: now, Renewed: now}
	if err := writeRecord(s.nodeFile(r.Node), node); err != nil {
		return identity.Scope{}, fmt.Errorf("store node: %w", err)
	}
	return scope, nil
}

// repeat answers the same key again for a short while.
func (s *Store) repeat(t Token, key string, now time.Time) (identity.Scope, error) {
	r, err := readRecord[tokenRecord](s.usedFile(t.ID()))
	if errors.Is(err, fs.ErrNotExist) {
		return identity.Scope{}, refuseToken("unknown or revoked")
	}
	if err != nil {
		return identity.Scope{}, err
	}
	if !r.matches(t) || r.Used == nil || now.Sub(*r.Used) > repeatTime || subtle.ConstantTimeCompare([]byte(r.Key), []byte(key)) != 1 {
		return identity.Scope{}, refuseToken("used before")
	}
	node, err := s.current(r.Node, key)
	if err != nil {
		return identity.Scope{}, err
	}
	return s.scope(node.Node, node.IDs)
}

func (r *tokenRecord) matches(t Token) bool {
	hash := t.hash()
	return subtle.ConstantTimeCompare([]byte(r.Hash), []byte(hex.EncodeToString(hash[:]))) == 1
}

func refuseToken(detail string) error {
	return &identity.Refusal{Reason: flow.ReasonEnrolmentToken, Detail: "the join token is " + detail}
}

// current returns the record of a node that is enrolled with that key.
func (s *Store) current(node, key string) (NodeInfo, error) {
	n, err := readRecord[NodeInfo](s.nodeFile(node))
	if errors.Is(err, fs.ErrNotExist) {
		return NodeInfo{}, &identity.Refusal{Reason: flow.ReasonEnrolmentNode, Detail: "node " + node + " is not enrolled, or was removed"}
	}
	if err != nil {
		return NodeInfo{}, err
	}
	if subtle.ConstantTimeCompare([]byte(n.Key), []byte(key)) != 1 {
		return NodeInfo{}, &identity.Refusal{Reason: flow.ReasonEnrolmentNode, Detail: "node " + node + " has enrolled with another key since"}
	}
	return n, nil
}

// renewScope returns the present scope of a node that is enrolled with key.
func (s *Store) renewScope(node, key string) (identity.Scope, error) {
	n, err := s.current(node, key)
	if err != nil {
		return identity.Scope{}, err
	}
	return s.scope(n.Node, n.IDs)
}

// issued notes the intermediate that a node was given.
func (s *Store) issued(node, key, serial string) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	n, err := s.current(node, key)
	if err != nil {
		return err
	}
	n.Serial, n.Renewed = serial, s.now()
	return writeRecord(s.nodeFile(node), n)
}

// Nodes lists the nodes.
func (s *Store) Nodes() ([]NodeInfo, error) {
	var list []NodeInfo
	if err := eachRecord(filepath.Join(s.dir, "nodes"), func(n NodeInfo) { list = append(list, n) }); err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	return list, nil
}

// SetScope changes what a node may issue from its next renewal on, which is
// at most half an intermediate's life away.
func (s *Store) SetScope(node string, ids []string) error {
	scope, err := s.scope(node, ids)
	if err != nil {
		return fmt.Errorf("set scope: %w", err)
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	n, err := readRecord[NodeInfo](s.nodeFile(node))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set scope: node %s is not enrolled; create a join token for it", node)
	}
	if err != nil {
		return fmt.Errorf("set scope: %w", err)
	}
	n.IDs = scope.IDs
	if err := writeRecord(s.nodeFile(node), n); err != nil {
		return fmt.Errorf("set scope: %w", err)
	}
	return nil
}

// RemoveNode ends a node's renewals and returns its latest serial, which a
// revocation voids before it ends by itself.
func (s *Store) RemoveNode(node string) (serial string, err error) {
	if err := identity.CheckNodeName(node); err != nil {
		return "", fmt.Errorf("remove node: %w", err)
	}
	unlock, err := s.lock()
	if err != nil {
		return "", err
	}
	defer unlock()
	n, err := readRecord[NodeInfo](s.nodeFile(node))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("remove node: %s is not enrolled", node)
	}
	if err == nil {
		err = os.Remove(s.nodeFile(node))
	}
	if err != nil {
		return "", fmt.Errorf("remove node: %w", err)
	}
	return n.Serial, nil
}

// sweep removes what has expired. The caller holds the lock.
func (s *Store) sweep() error {
	now := s.now()
	var old []string
	err := eachRecord(filepath.Join(s.dir, "tokens"), func(r tokenRecord) {
		if !now.Before(r.Expires) {
			old = append(old, s.tokenFile(r.ID))
		}
	})
	if err == nil {
		err = eachRecord(filepath.Join(s.dir, "tokens", "used"), func(r tokenRecord) {
			if r.Used == nil || now.Sub(*r.Used) > keepUsed {
				old = append(old, s.usedFile(r.ID))
			}
		})
	}
	for _, path := range old {
		if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) && err == nil {
			err = rerr
		}
	}
	if err != nil {
		return fmt.Errorf("sweep join tokens: %w", err)
	}
	return nil
}
