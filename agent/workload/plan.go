// SPDX-License-Identifier: Apache-2.0

package workload

import "github.com/sallyport-dev/sallyport/policies/compile"

// FromPlan returns the identities of a plan that a workload of this node can
// have.
func FromPlan(p *compile.Plan) []Identity {
	var all []Identity
	for _, id := range p.Identities() {
		s := id.Selector
		if s == nil {
			continue
		}
		i := Identity{Name: id.FullName(), Unit: s.SystemdUnit, Path: s.CgroupPath, Binary: s.ProcessBinary, Endpoints: id.Endpoints}
		if s.HasUID {
			uid := s.UID
			i.UID = &uid
		}
		all = append(all, i)
	}
	return all
}
