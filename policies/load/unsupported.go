// SPDX-License-Identifier: Apache-2.0

package load

import "github.com/sallyport-dev/sallyport/policies/internal/ungated"

// unsupported lists what the policy language has and this version does not
// do: TYPE.FIELD, TYPE.FIELD=WORD, and kinds. Each is an error, because a
// line that is accepted and does nothing protects nobody. What is built is
// taken out.
var unsupported = map[string]bool{
	"MachineIdentitySpec.tokens": true,
	"Selector.all":               true,
	"ProcessSelector.digest":     true,
	"Egress.host":                true,
	"Egress.tls":                 true,

	"TokenIssuerSpec.claims":           true,
	"TokenIssuerSpec.introspection":    true,
	"TokenIssuerSpec.tokenURL":         true,
	"RelationModelSpec.address":        true,
	"RelationModelSpec.engine=openfga": true,
	"RelationModelSpec.engine=spicedb": true,

	"APIPolicySpec.onError=cached": true,
	"Protect.protocol=grpc":        true,
	"App.tls=terminate":            true,
	"App.tls=reencrypt":            true,
	"Rule.grpc":                    true,
	"Rule.upgrade":                 true,
	"App.certificate":              true,
	"App.key":                      true,
	"App.ca":                       true,
	"Token.acr":                    true,
	"Token.maxAge":                 true,
	"Token.boundTo=dpop":           true,
	"Token.boundTo=signature":      true,
	"Anomaly.stepUp":               true,
	"Anomaly.falsePositives":       true,
}

// refused says whether an entry is on the list.
func refused(entry string) bool { return unsupported[entry] && !ungated.Lifted(entry) }

const notSupported = "is not supported by this version"
