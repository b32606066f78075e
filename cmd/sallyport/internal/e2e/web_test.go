// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// web is an nginx: files below /files/, uploads by PUT to /up/, and /live/ for
// whoever serves at its tmp/live.sock.
type web struct {
	t     *testing.T
	dir   string
	port  int
	asked int // how often its status was asked for
	*program
}

const bigSize = 64 << 20

// startNginx starts nginx in a cgroup and a namespace and waits until it
// listens, which is seen in its own log and not by a call. tls are the files of
// a certificate and its key, for one that speaks TLS.
func startNginx(t *testing.T, cgroup string, ns *testenv.Netns, port int, tls ...string) *web {
	t.Helper()
	w := &web{t: t, dir: folder(t), port: port}
	for _, d := range []string{"files", "up", "tmp"} {
		if err := os.Mkdir(filepath.Join(w.dir, d), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(w.dir, d), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(w.dir, "files", "hello"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	flag, files := "", ""
	if len(tls) == 2 {
		flag, files = " ssl", fmt.Sprintf("ssl_certificate %s; ssl_certificate_key %s;", tls[0], tls[1])
	}
	config := fmt.Sprintf(`daemon off;
worker_processes 2;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log notice;
events { worker_connections 512; }
http {
  log_format seen '$remote_addr:$remote_port $request_method $uri $status $http_x_forwarded_client_cert $http_user_agent';
  access_log %[1]s/access.log seen;
  client_body_temp_path %[1]s/tmp/body;
  proxy_temp_path %[1]s/tmp/proxy;
  fastcgi_temp_path %[1]s/tmp/fastcgi;
  uwsgi_temp_path %[1]s/tmp/uwsgi;
  scgi_temp_path %[1]s/tmp/scgi;
  client_max_body_size 0;
  keepalive_requests 100000;
  server {
    listen 0.0.0.0:%[2]d%[3]s;
    listen [::]:%[2]d%[3]s;
    %[4]s
    root %[1]s;
    location /files/ { }
    location /up/ { dav_methods PUT; }
    location /live/ {
      proxy_pass http://unix:%[1]s/tmp/live.sock;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection "upgrade";
    }
  }
  server {
    listen unix:%[1]s/tmp/status.sock;
    access_log off;
    location / { stub_status; }
  }
}
`, w.dir, port, flag, files)
	if err := os.WriteFile(filepath.Join(w.dir, "nginx.conf"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	w.program = start(t, cgroup, ns, exec.Command("nginx", "-e", w.dir+"/error.log", "-p", w.dir, "-c", w.dir+"/nginx.conf"))
	eventually(t, "nginx to run", func() string {
		select {
		case <-w.done:
			t.Fatalf("nginx ended: %v %s %s", w.err, w.errs, w.log("error.log"))
		default:
		}
		if strings.Count(w.log("error.log"), "start worker process ") < 2 {
			return "no workers yet: " + w.log("error.log")
		}
		for _, table := range []string{"tcp", "tcp6"} {
			if !listens(fmt.Sprintf("/proc/%d/net/%s", w.cmd.Process.Pid, table), port) {
				return "no listener in /proc/net/" + table
			}
		}
		return ""
	})
	// Its workers are not its only children: the cgroup goes with the node.
	return w
}

// listens says whether a table of /proc/net (proc_net_tcp.rst) holds a
// listening socket on a port.
func listens(table string, port int) bool {
	b, _ := os.ReadFile(table)
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
			return true
		}
	}
	return false
}

func (w *web) log(name string) string {
	b, _ := os.ReadFile(filepath.Join(w.dir, name))
	return string(b)
}

// requests counts what has reached nginx, by its stub_status: from the first
// byte on, where the access log hears of a request only after its answer.
func (w *web) requests() int {
	w.t.Helper()
	c, err := net.Dial("unix", filepath.Join(w.dir, "tmp", "status.sock"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		w.t.Fatal(err)
	}
	w.asked++
	answer, err := io.ReadAll(c)
	if err != nil {
		w.t.Fatal(err)
	}
	_, numbers, _ := strings.Cut(string(answer), " requests\n")
	var accepted, handled, requests int
	if _, err := fmt.Sscan(numbers, &accepted, &handled, &requests); err != nil {
		w.t.Fatalf("nginx's status is %q: %v", answer, err)
	}
	return requests - w.asked
}

// big makes a file of 64 MiB and returns its digest.
func (w *web) big() string {
	w.t.Helper()
	b := make([]byte, bigSize)
	rand.Read(b)
	if err := os.WriteFile(filepath.Join(w.dir, "files", "big"), b, 0o644); err != nil {
		w.t.Fatal(err)
	}
	return digest(b)
}

func digest(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func fileDigest(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return digest(b)
}

// curl runs curl and returns what it wrote; -sS and a bound on time are given.
func curl(t *testing.T, cgroup string, ns *testenv.Netns, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command("curl", append([]string{"-sS", "--max-time", "80", "--noproxy", "*"}, args...)...)
	var out lockedBuffer
	cmd.Stdout = &out
	cmd.Stdin = strings.NewReader("")
	p := start(t, cgroup, ns, cmd)
	<-p.done
	if p.err != nil {
		return out.String(), fmt.Errorf("%w: %s", p.err, strings.TrimSpace(p.errs.String()))
	}
	return out.String(), nil
}

// code calls a URL and returns the status and, of a refusal, its reason; what
// curl could not do is "refused: ...".
func code(t *testing.T, cgroup string, ns *testenv.Netns, url string, args ...string) string {
	t.Helper()
	out, err := curl(t, cgroup, ns, append([]string{"-w", "\n%{http_code}", url}, args...)...)
	if err != nil {
		return "refused: " + err.Error()
	}
	i := strings.LastIndexByte(out, '\n')
	status, body := out[i+1:], out[:i]
	if _, rest, ok := strings.Cut(body, `"reason":"`); ok {
		reason, _, _ := strings.Cut(rest, `"`)
		status += " " + reason
	}
	return status
}
