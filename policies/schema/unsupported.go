// SPDX-License-Identifier: Apache-2.0

package schema

import "github.com/sallyport-dev/sallyport/policies/internal/ungated"

// unsupported lists what the policy language has and this version does not
// do: TYPE.FIELD and TYPE.FIELD=WORD. Each is an error, because a
// line that is accepted and does nothing protects nobody. What is built is
// taken out.
var unsupported = map[string]bool{
	"RelationModelSpec.engine=spicedb": true,
}

// Refused says whether this version refuses a field of a type.
func Refused(owner, field string) bool { return refused(owner + "." + field) }

// RefusedWord says whether this version refuses a word in a field of a type.
func RefusedWord(owner, field, word string) bool { return refused(owner + "." + field + "=" + word) }

// refused says whether an entry is on the list.
func refused(entry string) bool { return unsupported[entry] && !ungated.Lifted(entry) }

// NotSupported is what is said of it.
const NotSupported = "is not supported by this version"
