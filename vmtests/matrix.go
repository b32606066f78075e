// SPDX-License-Identifier: Apache-2.0

package vmtests

// packages are those whose tests are about the kernel.
var packages = []string{
	"agent/testenv", "agent/preflight", "agent/loader", "agent/datapath", "agent/sockdiag", "agent/sockets",
}

// guestModules are what the tests, and the port to the host, need of a
// kernel that has them as modules.
var guestModules = []string{
	"virtio_pci", "virtio_console", "veth", "inet_diag", "tcp_diag", "udp_diag", "sctp",
	"nfnetlink", "xfrm_user", // netlink.NewHandleAt opens a socket for each
}

// kernel is one row of the matrix.
type kernel struct {
	version string
	// lacks names what does not pass there, by package and top-level test,
	// with an expression that matches every complaint of it, so that it hides
	// nothing else. It is run all the same: once it passes, it has to leave
	// the list. Every other test has to pass; one that is skipped counts as
	// failed.
	lacks map[string]map[string]string
}

// tcx is the complaint of a kernel that cannot attach to interfaces.
const tcx = `tcx not supported \(requires >= v6\.6\)$`

var matrix = []kernel{
	{version: "6.1", lacks: map[string]map[string]string{
		"agent/preflight": {
			"TestRunHere": tcx,
		},
		"agent/loader": {
			"TestTakeOverKeepsLinksAndMaps": tcx,
			"TestUninstallLeavesNothing":    tcx,
			"TestStalePinsAreSwept":         tcx,
			"TestInterfaceOfAnotherNetns":   tcx,
			"TestNothingLeaks":              tcx,
		},
		"agent/datapath": {
			"TestBackstop":                tcx,
			"TestBackstopAndEgress":       tcx,
			"TestBackstopOfEgressByProxy": tcx,
			"TestFramesByHand":            tcx,
			"TestHostSideOfAVeth":         tcx,
			"TestSamples":                 tcx,
			"TestFloodsLoseNoRefusal":     tcx,
			"TestEndlessRequestLine":      tcx,
		},
	}},
	{version: "6.12"},
}
