// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
)

// Kubernetes selects pods of the identity's namespace.
type Kubernetes struct {
	ServiceAccount string
	Labels         map[string]string // all of them; nil for any
}

var (
	accountForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	// The syntax of labels: an optional DNS name and /, then a name.
	labelKeyForm   = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelValueForm = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
)

// kubernetes compiles a selector of pods.
func (c *compiler) kubernetes(id *Identity, d *identityDoc, out *Selector) {
	k := d.Value.Spec.Select.Kubernetes
	out.Kubernetes = &Kubernetes{ServiceAccount: k.ServiceAccount, Labels: k.Labels}
	at := []any{"spec", "select", "kubernetes"}
	switch {
	case k.ServiceAccount == "":
		c.empty(&d.Document, "serviceAccount", append(slices.Clone(at), "serviceAccount")...)
	case !accountForm.MatchString(k.ServiceAccount):
		c.report.Errorf(d.At(append(slices.Clone(at), "serviceAccount")...), "serviceAccount: %q is not the name of a service account", k.ServiceAccount)
	}
	if pos, ok := d.Lookup("spec", "select", "kubernetes", "labels"); ok && d.Empty("spec", "select", "kubernetes", "labels") {
		c.report.Errorf(pos, "labels: empty says nothing; leave it out")
	}
	for _, key := range slices.Sorted(maps.Keys(k.Labels)) {
		if !labelKeyForm.MatchString(key) {
			c.report.Errorf(d.Key("spec", "select", "kubernetes", "labels", key), "labels: %q is not a label's name", key)
		}
		if v := k.Labels[key]; !labelValueForm.MatchString(v) {
			c.report.Errorf(d.At("spec", "select", "kubernetes", "labels", key), "labels: %q is not a label's value", v)
		}
	}
	c.report.Warnf(d.Key("spec", "select", "kubernetes"), "kubernetes: this version has no source of pods: no workload of this node will be recognised as %s", id.fullName)
}

// checkPods refuses identities that would match one pod.
func (c *compiler) checkPods(docs map[*Identity]*identityDoc) {
	accounts := make(map[string][]*Identity)
	for _, id := range c.plan.identities {
		if id.Selector == nil || id.Selector.Kubernetes == nil {
			continue
		}
		k := id.Selector.Kubernetes
		account := id.Namespace + "/" + k.ServiceAccount
		for _, other := range accounts[account] {
			if !k.meets(other.Selector.Kubernetes) || !id.Selector.meets(other.Selector) {
				continue
			}
			c.report.Errorf(docs[id].Key("spec", "select"), "select: a pod of %s could also match %s at %s, and be denied as either%s",
				id.fullName, other.fullName, other.Position, c.tellApart(k, other))
		}
		accounts[account] = append(accounts[account], id)
	}
}

// tellApart suggests a label with which two selectors would exclude each
// other.
func (c *compiler) tellApart(k *Kubernetes, other *Identity) string {
	for _, key := range slices.Sorted(maps.Keys(other.Selector.Kubernetes.Labels)) {
		if _, ok := k.Labels[key]; !ok {
			return fmt.Sprintf("; give both a different value of label %q", key)
		}
	}
	return "; give them different service accounts, or different values of one label"
}

// meets says whether one pod could have the labels of both.
func (k *Kubernetes) meets(o *Kubernetes) bool {
	for key, v := range k.Labels {
		if w, ok := o.Labels[key]; ok && v != w {
			return false
		}
	}
	return true
}
