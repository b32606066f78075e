// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// StartAuthority starts the CA that the nodes share, in a namespace.
func (l *Lab) StartAuthority(ctx context.Context, space, address string) (*Process, error) {
	args := append([]string{l.program, "authority", "--listen", address}, l.authorityFlags()...)
	p, err := l.Start(space, "", "authority", nil, args...)
	if err != nil {
		return nil, err
	}
	l.authority = address
	return p, l.AwaitListener(ctx, space, address, p)
}

func (l *Lab) authorityFlags() []string {
	return []string{"--state-dir", filepath.Join(l.Dir, "authority"), "--trust-domain", TrustDomain, "--tpm", "none"}
}

// JoinToken makes, by the authority's own command, a join token for a node
// that may then issue the IDs of these identities.
func (l *Lab) JoinToken(ctx context.Context, node string, identities ...string) (string, error) {
	args := append([]string{"authority", "token", "create", "--node", node}, l.authorityFlags()...)
	for _, id := range identities {
		args = append(args, "--id", fmt.Sprintf("spiffe://%s/node/%s/ns/shop/%s", TrustDomain, node, id))
	}
	out, err := l.Command(ctx, args...)
	return strings.TrimSpace(out), err
}

// Command runs the sallyport binary and returns its standard output.
func (l *Lab) Command(ctx context.Context, args ...string) (string, error) {
	var errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, l.program, args...)
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("sallyport %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return string(out), err
}
