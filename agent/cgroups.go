// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/workload"
)

// ownCgroups are the cgroups of this agent: root is what it looks after, agent
// its own exempt leaf, userspace the one of the unprivileged process, which is
// not exempt.
type ownCgroups struct {
	root, agent, userspace string
	mount                  string // of the cgroup2 hierarchy
	agentID                uint64
}

// own says whether a path in the hierarchy is one of this agent's cgroups.
func (o *ownCgroups) own(path string) bool {
	at := filepath.Join(o.mount, path)
	return at == o.agent || at == o.userspace
}

// paths are this agent's own cgroups, in the hierarchy.
func (o *ownCgroups) paths() []string {
	return []string{strings.TrimPrefix(o.agent, o.mount), strings.TrimPrefix(o.userspace, o.mount)}
}

// findCgroups finds the subtree to look after and where the agent's own leaf
// in it is. A process that is beneath the subtree already (a systemd unit with
// Delegate=) stays beneath its own cgroup.
func (a *Agent) findCgroups() error {
	mount, err := workload.CgroupRoot()
	if err != nil {
		return err
	}
	root := mount
	if a.cfg.Kernel.CgroupRoot != "" {
		root = a.cfg.Kernel.CgroupRoot
	}
	if info, err := os.Stat(root); err != nil || !info.IsDir() {
		return fmt.Errorf("use cgroup root %s: it is not there", root)
	}
	rel, err := filepath.Rel(mount, root)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return fmt.Errorf("use cgroup root %s: it is not beneath %s, where cgroup2 is mounted", root, mount)
	}
	a.scope = filepath.Join("/", rel)
	own, err := ownCgroup()
	if err != nil {
		return err
	}
	base := filepath.Join(root, "sallyport")
	if within(a.scope, own) && own != a.scope {
		base = filepath.Join(mount, own)
		// Started again in its own leaf: its parent is the base.
		if filepath.Base(own) == "agent" {
			base = filepath.Dir(base)
		}
	}
	a.cgroups = ownCgroups{root: root, mount: mount, agent: filepath.Join(base, "agent"), userspace: filepath.Join(base, "userspace")}
	return nil
}

// enterCgroup moves the agent into its leaf: what is exempt is known by that,
// so nothing else may live there, and another agent must be known not to.
func (a *Agent) enterCgroup() error {
	if err := os.MkdirAll(a.cgroups.agent, 0o755); err != nil {
		return fmt.Errorf("make the agent's cgroup: %w", err)
	}
	pid := strconv.Itoa(os.Getpid())
	if err := os.WriteFile(filepath.Join(a.cgroups.agent, "cgroup.procs"), []byte(pid), 0); err != nil {
		return fmt.Errorf("enter the agent's cgroup %s: %w", a.cgroups.agent, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(a.cgroups.agent, &st); err != nil {
		return fmt.Errorf("read id of cgroup %s: %w", a.cgroups.agent, err)
	}
	a.cgroups.agentID = st.Ino
	return nil
}

// ownCgroup returns this process's cgroup in the cgroup2 hierarchy.
func ownCgroup() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("read own cgroup: %w", err)
	}
	for l := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(l), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("read own cgroup: no cgroup2 line in /proc/self/cgroup")
}

// within says whether path is root or beneath it; both are clean.
func within(root, path string) bool {
	return root == "/" || path == root || strings.HasPrefix(path, root+"/")
}
