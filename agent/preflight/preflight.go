// SPDX-License-Identifier: Apache-2.0

// Package preflight says what this kernel and this machine can do for
// Sallyport, by trying it: real loads and attaches, in a cgroup and a
// network namespace that it makes for that and removes again.
package preflight

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/sockdiag"
)

// Check is one thing that Sallyport needs of the machine.
type Check struct {
	Name     string
	Have     bool
	Required bool   // the agent does not start without it
	Needs    string // from which kernel, or which set-up, it is had
	Lost     string // what is lost without it
	Detail   string // what the kernel said, "" where Have
}

// feature is a check of programs.
type feature struct {
	name, needs, lost string
	required          bool
	programs          []string
}

var features = []feature{
	{"connect and sendmsg hooks", "Linux 6.1, CONFIG_CGROUP_BPF", "workloads' connections cannot be verified", true,
		[]string{"connect4", "connect6", "sendmsg4", "sendmsg6"}},
	{"socket creation hook", "Linux 6.1, CONFIG_CGROUP_BPF", "sockets that no other hook sees cannot be refused", true, []string{"sock_create"}},
	{"bind hooks", "Linux 6.1, CONFIG_CGROUP_BPF", "protected ports can be taken while their server is down", true,
		[]string{"bind4", "bind6", "post_bind4", "post_bind6"}},
	{"getpeername hooks", "Linux 6.1, CONFIG_CGROUP_BPF", "servers do not see their true clients", true, []string{"getpeername4", "getpeername6"}},
	{"socket operations hook", "Linux 6.1, CONFIG_CGROUP_BPF", "flows cannot be known", true, []string{"track", "forget"}},
	{"socket look-up hook", "Linux 5.9, CONFIG_BPF_STREAM_PARSER", "protected ports cannot be guarded", true, []string{"steer"}},
	{"tcx", "Linux 6.6, CONFIG_NET_XGRESS", "no samples, no backstop", false, []string{"tc_egress", "tc_ingress", "tc_confined", "tc_deliver"}},
	{"cgroup_mkdir trace point", "Linux 5.5, CONFIG_DEBUG_INFO_BTF", "a workload that is started again is known only after the next scan", false,
		[]string{"cgroup_mkdir"}},
	{"iterator over open files", "Linux 5.11, CONFIG_DEBUG_INFO_BTF", "sockets that a workload made before it was known are refused", false,
		[]string{"adopt"}},
}

// Run tries everything. cgroupRoot is the cgroup2 directory that the agent
// is to watch, "" for the root of the hierarchy.
func Run(cgroupRoot string) []Check {
	checks := []Check{
		check("privilege", true, "root with CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_PTRACE, CAP_SYS_ADMIN", "the agent cannot start", privilege()),
		check("BTF of the kernel", true, "CONFIG_DEBUG_INFO_BTF", "programs cannot be fitted to this kernel", btf()),
		check("bpffs", true, "CONFIG_BPF_SYSCALL", "what was enforced does not outlive the agent", bpffs()),
	}
	if cgroupRoot == "" {
		var err error
		cgroupRoot, err = loader.CgroupMount()
		checks = append(checks, check("cgroup2", true, "mount -t cgroup2 none /sys/fs/cgroup", "workloads cannot be told apart", err))
		if err != nil {
			return checks
		}
	}
	checks = append(checks, check("netns cookie", true, "Linux 5.14", "network namespaces cannot be told apart", netnsCookie()))
	results, err := loader.Probe(cgroupRoot)
	if results == nil {
		return append(checks, check("loading BPF programs", true, "CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF", "the agent cannot start", err))
	}
	for _, f := range features {
		checks = append(checks, check(f.name, f.required, f.needs, f.lost, f.outcome(results)))
	}
	return append(checks,
		check("closing connections", false, "Linux 4.5, CONFIG_INET_DIAG_DESTROY",
			"revocation closes only what passes through the proxy; live direct connections stay", destroy()),
		check("Landlock", false, "Linux 5.13, CONFIG_SECURITY_LANDLOCK, landlock among the active LSMs",
			"the userspace process can open what its user may", landlockABI()),
		check("BPF closed to users", false, "sysctl kernel.unprivileged_bpf_disabled=2", "any user may load socket programs", unprivileged()),
	)
}

// landlockABI fails where Landlock is not built in or not active.
func landlockABI() error {
	_, err := llsys.LandlockGetABIVersion()
	return err
}

// Missing says what the agent cannot start without, one error each.
func Missing(checks []Check) error {
	var errs []error
	for _, c := range checks {
		if c.Required && !c.Have {
			errs = append(errs, fmt.Errorf("%s is missing (%s): %s: needs %s", c.Name, c.Detail, c.Lost, c.Needs))
		}
	}
	return errors.Join(errs...)
}

func check(name string, required bool, needs, lost string, err error) Check {
	c := Check{Name: name, Have: err == nil, Required: required, Needs: needs, Lost: lost}
	if err != nil {
		c.Detail = err.Error()
	}
	return c
}

func (f feature) outcome(results map[string]error) error {
	for _, p := range f.programs {
		if err := results[p]; err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// capabilities that the agent needs, by their numbers.
var capabilities = []struct {
	name   string
	number uint
}{
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}, {"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE}, {"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN},
	{"CAP_PERFMON", unix.CAP_PERFMON}, {"CAP_BPF", unix.CAP_BPF},
}

func privilege() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	var missing []string
	for _, c := range capabilities {
		if data[c.number/32].Effective&(1<<(c.number%32)) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("without %s", strings.Join(missing, ", "))
	}
	return nil
}

func btf() error {
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	return err
}

func bpffs() error {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(string(b)), "bpf") {
		return errors.New("this kernel has no bpffs")
	}
	return nil
}

func netnsCookie() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return err
}

func unprivileged() error {
	b, err := os.ReadFile("/proc/sys/kernel/unprivileged_bpf_disabled")
	if err != nil {
		return err
	}
	if v := strings.TrimSpace(string(b)); v != "1" && v != "2" {
		return fmt.Errorf("it is %s", v)
	}
	return nil
}

// destroy closes a listener of its own to see whether the kernel can.
func destroy() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 1); err != nil {
		return err
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return err
	}
	diag, err := sockdiag.Open(-1)
	if err != nil {
		return err
	}
	defer diag.Close()
	sockets, err := diag.List(sockdiag.Listen)
	if err != nil {
		return err
	}
	for i := range sockets {
		if sockets[i].Cookie == cookie {
			return diag.Destroy(&sockets[i])
		}
	}
	return errors.New("sock_diag does not list a listener of our own")
}
