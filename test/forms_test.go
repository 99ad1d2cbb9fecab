package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/meshtest"
)

// serveFiles starts nginx as an application that answers in every form that
// HTTP/1.1 has, and takes files by PUT.
func (w *world) serveFiles(program, addr, root string) {
	w.t.Helper()
	if err := os.Chmod(w.dir, 0o755); err != nil { // its workers are other users when it is root
		w.t.Fatal(err)
	}
	dir := w.path("files")
	for _, d := range []string{dir, filepath.Join(root, "v1/strict")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "nginx.conf")
	w.put(file, fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events {}
http {
  access_log off; default_type text/plain; client_max_body_size 20m;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server {
    listen %[2]s; root %[3]s;
    location / { dav_methods PUT DELETE; }
    location = /v1/strict/nothing { return 204; }
    location = /v1/strict/moved { return 301 /v1/strict/file; }
    location = /v1/strict/chunked { ssi on; ssi_types *; try_files /v1/strict/file =404; }
    location = /v1/strict/until-close { ssi on; ssi_types *; chunked_transfer_encoding off; try_files /v1/strict/file =404; }
  }
}
`, dir, addr, root))
	w.serveBy(addr, program, "-p", dir, "-e", "stderr", "-c", file)
}

// TestFormsOfMessages has curl call nginx through a pair of real sidecars, in
// every form that a message can have.
func TestFormsOfMessages(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	nginx := meshtest.Need(t, "nginx")
	w := newWorld(t, within)
	row := fmt.Sprintf("p, strict, in, %s, %s, 8443, *, /v1/strict/**, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"))
	w.extend("access.csv", row)
	w.startIssuer()
	bill, pay := &node{name: "billing"}, &node{name: "payment"}
	w.join(bill)
	w.join(pay)
	root := w.path("root")
	w.serveFiles(nginx, bill.app, root)
	content := bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // 1 MB
	onDisk := filepath.Join(root, "v1/strict/file")
	w.put(onDisk, string(content))
	w.put(w.path("upload"), string(content))
	w.awaitReady(w.start("billing", nil, "sidecar", "run", "--config", w.path("billing", "config.yaml")))
	payment := w.startNode(pay)
	const url = "http://billing.mesh.internal/v1/strict/"
	got := w.path("got")
	// run is curl with the body in a file; what it prints is the head.
	run := func(args ...string) string {
		t.Helper()
		_ = os.Remove(got)
		r := ask[runReply](payment, "/run", append([]string{"curl", "-sS", "--max-time", "20", "-D", "-", "-o", got}, args...))
		if r.Code != 0 {
			t.Errorf("curl %v ended with %d: %s", args, r.Code, r.Output)
		}
		return r.Output
	}
	body := func() []byte {
		b, _ := os.ReadFile(got) // there is none when nothing came
		return b
	}
	w.awaitReach(payment, url+"file")
	etag := ""
	t.Run("a length", func(t *testing.T) {
		head := run(url + "file")
		_, etag, _ = strings.Cut(head, "ETag: ")
		etag, _, _ = strings.Cut(etag, "\r\n")
		if !strings.Contains(head, "Content-Length: 1048576\r\n") || !bytes.Equal(body(), content) || etag == "" {
			t.Errorf("%d bytes: %s", len(body()), head)
		}
	})
	for _, c := range []struct {
		name  string
		args  []string
		heads []string
		lacks string
		body  []byte
	}{
		{"chunks", []string{url + "chunked"}, []string{" 200 ", "Transfer-Encoding: chunked\r\n"}, "Content-Length", content},
		{"until the connection closes", []string{url + "until-close"}, []string{" 200 ", "Transfer-Encoding: chunked\r\n"}, "Connection: close", content},
		{"chunks to HTTP/1.0", []string{"--http1.0", url + "chunked"}, []string{" 200 ", "Connection: close\r\n"}, "Transfer-Encoding", content},
		{"HEAD", []string{"-I", url + "file"}, []string{" 200 ", "Content-Length: 1048576\r\n"}, "chunked", nil},
		{"HEAD of chunks", []string{"-I", url + "chunked"}, []string{" 200 "}, "Content-Length", nil},
		{"204", []string{url + "nothing"}, []string{" 204 "}, "Content-Length", nil},
		{"a range", []string{"-r", "0-15", url + "file"}, []string{" 206 ", "Content-Range: bytes 0-15/1048576\r\n"}, "chunked", content[:16]},
		{"two ranges", []string{"-r", "0-1,4-5", url + "file"}, []string{" 206 ", "multipart/byteranges"}, "chunked", nil},
		{"a redirection", []string{"-L", url + "moved"}, []string{" 301 ", " 200 "}, "Transfer-Encoding", content},
		{"an upload that waits for 100", []string{"-T", w.path("upload"), "-H", "Expect: 100-continue", url + "put"}, []string{" 100 ", " 201 "}, "417", nil},
		{"an upload in chunks", []string{"-T", w.path("upload"), "-H", "Transfer-Encoding: chunked", "-H", "Expect:", url + "put"}, []string{" 204 "}, " 100 ", nil},
		{"DELETE", []string{"-X", "DELETE", url + "put"}, []string{" 204 "}, "Content-Length", nil},
		{"three on one connection", []string{url + "nothing", "-o", got, url + "file", "-o", got, url + "until-close"}, []string{" 204 ", " 200 "}, " 5", content},
	} {
		t.Run(c.name, func(t *testing.T) {
			head := run(c.args...)
			for _, want := range c.heads {
				if !strings.Contains(head, want) {
					t.Errorf("want %q in\n%s", want, head)
				}
			}
			if strings.Contains(head, c.lacks) {
				t.Errorf("%q is in\n%s", c.lacks, head)
			}
			if c.body != nil && !bytes.Equal(body(), c.body) {
				t.Errorf("got %d bytes, want %d", len(body()), len(c.body))
			}
			if put, err := os.ReadFile(filepath.Join(root, "v1/strict/put")); strings.Contains(c.name, "upload") && (err != nil || !bytes.Equal(put, content)) {
				t.Errorf("%d bytes arrived: %v", len(put), err)
			}
		})
	}
	t.Run("304", func(t *testing.T) {
		if head := run("-H", "If-None-Match: "+etag, url+"file"); !strings.Contains(head, " 304 ") || len(body()) != 0 {
			t.Errorf("got %s", head)
		}
	})
	t.Run("requests in a row without waiting", func(t *testing.T) {
		one := "GET /v1/strict/nothing HTTP/1.1\r\n" + strictHost + "\r\n"
		last := "GET /v1/strict/nothing HTTP/1.1\r\n" + strictHost + "Connection: close\r\n\r\n"
		r := ask[saidReply](payment, "/say", sayRequest{Address: pay.out, Say: [][]byte{[]byte(strings.Repeat(one, 9) + last)}})
		if r.Status != 204 || strings.Count(r.Rest, "HTTP/1.1 204 ") != 9 {
			t.Errorf("got %+v", r)
		}
	})
}
