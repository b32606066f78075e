// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/pem"
	"net/netip"
	"os"
	"strings"
	"testing"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	fga "github.com/openfga/openfga/pkg/server"
	"github.com/openfga/openfga/pkg/storage/memory"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/userspace/obtain/issuertest"
)

// TestRelationsElsewhere: relations are those of an OpenFGA server, while it
// answers.
func TestRelationsElsewhere(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, far := one(t)
	i := issuertest.New(t, issuerURL, addrA)
	for name, content := range map[string][]byte{"roots.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Root}), "key": []byte("unused\n")} {
		if err := os.WriteFile(n.path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(n.path("roots.pem"), 0o644); err != nil { // the proxy's process reads it too
		t.Fatal(err)
	}
	n.env = []string{"SSL_CERT_FILE=" + n.path("roots.pem"), "SSL_CERT_DIR=/nonexistent"}
	n.policy("shop.yaml", strings.Replace(shopIn("enforce"), `http: ["GET /files/{name}", "HEAD /files/{name}"]}`,
		`http: ["GET /files/{name}"], relation: "user:client can_read doc:{header.X-Doc}"}`, 1)+`---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: docs, namespace: shop}
spec:
  engine: openfga
  address: "`+addrA+`:8081"
  store: docs
  credentials: `+n.path("key")+`
  model: |
    model
      schema 1.1
    type user
    type doc
      relations
        define can_read: [user]
`)
	engine := fga.MustNewServerWithOpts(fga.WithDatastore(memory.New()))
	t.Cleanup(engine.Close)
	store, err := engine.CreateStore(t.Context(), &openfgav1.CreateStoreRequest{Name: "docs"})
	if err != nil {
		t.Fatal(err)
	}
	serve := func() *grpc.Server {
		t.Helper()
		s := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&i.Certificate)))
		openfgav1.RegisterOpenFGAServiceServer(s, engine)
		go s.Serve(far.Listen(t, "tcp", netip.MustParseAddrPort(addrA+":8081"))) //nolint:errcheck // ends with Stop
		t.Cleanup(s.Stop)
		return s
	}
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")
	get := func() string {
		t.Helper()
		return code(t, n.group("client"), n.ns, webURL+"/files/hello", "-H", "X-Doc: 1")
	}
	await := func(want string) {
		t.Helper()
		eventually(t, "the call to get "+want, func() string {
			if got := get(); got != want {
				return got
			}
			return ""
		})
	}
	if got := get(); got != "503 relation_unavailable" {
		t.Errorf("with the engine down: %s", got)
	}
	n.await("say that it does not answer", func(s *controlpb.StatusReply) bool {
		for _, p := range s.GetProblems() {
			if p.GetId() == "relations" && strings.Contains(p.GetText(), addrA+":8081") {
				return true
			}
		}
		return false
	})
	s := serve()
	await("403 relation_missing")
	if _, err := engine.Write(t.Context(), &openfgav1.WriteRequest{StoreId: store.GetId(),
		Writes: &openfgav1.WriteRequestWrites{TupleKeys: []*openfgav1.TupleKey{{User: "user:client", Relation: "can_read", Object: "doc:1"}}}}); err != nil {
		t.Fatal(err)
	}
	await("200")
	n.mustRun("relation", "delete", "user:client", "can_read", "doc:1")
	if got := get(); got != "403 relation_missing" {
		t.Errorf("deleted by our own verb: %s", got)
	}
	n.mustRun("relation", "write", "user:client", "can_read", "doc:1")
	if got := get(); got != "200" {
		t.Errorf("written by our own verb: %s", got)
	}
	if out := n.mustRun("relation", "read", "--object", "doc:1"); !strings.Contains(out, "user:client") {
		t.Errorf("read says %q", out)
	}
	s.Stop()
	await("503 relation_unavailable")
	serve()
	await("200")
}
