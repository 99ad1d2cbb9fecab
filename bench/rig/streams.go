package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Streams says how a pair of another program carries TCP: mutual TLS 1.3
// between both halves, AES-128-GCM as ours, no resumption.
type Streams struct {
	// Origin is where the far half connects to.
	Origin string
	// Group is the key exchange in OpenSSL's words, such as "X25519".
	Group string
	// Workers, or threads, of each half.
	Workers int
	// Buffer is the size of a relay's buffer in KiB, where one can be set.
	Buffer int
}

const suite = "TLS_AES_128_GCM_SHA256"

// StreamModule is where Debian keeps nginx's stream module.
const StreamModule = "/usr/lib/nginx/modules/ngx_stream_module.so"

// NginxStream is a pair of nginx.
func (g *Ground) NginxStream(ctx context.Context, s Streams) (*Pair, error) {
	front, far, err := g.Ports()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("nginx-w%d-%dk", s.Workers, s.Buffer)
	conf := func(half, server string) (string, error) {
		home := filepath.Join(g.Dir, name+"-"+half)
		if err := os.MkdirAll(home, 0o700); err != nil {
			return "", err
		}
		return g.File(name+"-"+half+".conf", fmt.Sprintf(`load_module %s;
daemon off;
worker_processes %d;
pid %s/pid;
error_log %s/error.log;
events { worker_connections 8192; multi_accept on; }
stream {
  access_log off;
  proxy_buffer_size %dk; proxy_timeout 300s;
  %s
}
`, StreamModule, s.Workers, home, home, s.Buffer, server))
	}
	back, err := conf("back", fmt.Sprintf(`server {
    listen %s ssl backlog=4096;
    ssl_protocols TLSv1.3; ssl_certificate %s/server.pem; ssl_certificate_key %s/server.pem;
    ssl_verify_client on; ssl_client_certificate %s/ca.pem; ssl_session_cache off; ssl_session_tickets off;
    ssl_ecdh_curve %s; ssl_conf_command Ciphersuites %s;
    proxy_pass %s;
  }`, far, g.Dir, g.Dir, g.Dir, s.Group, suite, s.Origin))
	if err != nil {
		return nil, err
	}
	head, err := conf("front", fmt.Sprintf(`server {
    listen %s backlog=4096;
    proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_name server.bench.test; proxy_ssl_server_name on; proxy_ssl_session_reuse off;
    proxy_ssl_certificate %s/client.pem; proxy_ssl_certificate_key %s/client.pem;
    proxy_ssl_verify on; proxy_ssl_trusted_certificate %s/ca.pem;
    proxy_ssl_conf_command Groups %s; proxy_ssl_conf_command Ciphersuites %s;
    proxy_pass %s;
  }`, front, g.Dir, g.Dir, g.Dir, s.Group, suite, far))
	if err != nil {
		return nil, err
	}
	p := &Pair{Name: name, Target: front, Workers: true,
		Settings: fmt.Sprintf("%s, stream, %d workers each, proxy_buffer_size %dk, %s, %s, no access log, no resumption", Version("nginx", "-v"), s.Workers, s.Buffer, suite, s.Group)}
	return p, g.SpawnPair(ctx, p, far, []string{"nginx", "-c", back}, []string{"nginx", "-c", head})
}

// HAProxyStream is a pair of HAProxy.
func (g *Ground) HAProxyStream(ctx context.Context, s Streams) (*Pair, error) {
	front, far, err := g.Ports()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("haproxy-t%d-%dk", s.Workers, s.Buffer)
	conf := func(half, rest string) (string, error) {
		return g.File(name+"-"+half+".cfg", fmt.Sprintf(`global
  nbthread %d
  maxconn 8000
  tune.bufsize %d
  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
  ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
  ssl-default-bind-ciphersuites %s
  ssl-default-server-ciphersuites %s
defaults
  mode tcp
  timeout client 300s
  timeout server 300s
  timeout connect 5s
%s`, s.Workers, s.Buffer<<10, suite, suite, rest))
	}
	back, err := conf("back", fmt.Sprintf(`frontend f
  bind %s backlog 4096 ssl crt %s/server.pem ca-file %s/ca.pem verify required curves %s
  default_backend o
backend o
  server s %s
`, far, g.Dir, g.Dir, s.Group, s.Origin))
	if err != nil {
		return nil, err
	}
	head, err := conf("front", fmt.Sprintf(`frontend f
  bind %s backlog 4096
  default_backend o
backend o
  server s %s ssl crt %s/client.pem ca-file %s/ca.pem verify required sni str(server.bench.test) no-ssl-reuse
`, front, far, g.Dir, g.Dir))
	if err != nil {
		return nil, err
	}
	p := &Pair{Name: name, Target: front,
		Settings: fmt.Sprintf("%s, mode tcp, %d threads each, tune.bufsize %dk, %s, %s, no resumption, no log", Version("haproxy", "-v"), s.Workers, s.Buffer, suite, s.Group)}
	return p, g.SpawnPair(ctx, p, far, []string{"haproxy", "-db", "-f", back}, []string{"haproxy", "-db", "-f", head})
}

// Stunnel is a pair of stunnel, which has threads and a buffer of its own mind.
func (g *Ground) Stunnel(ctx context.Context, s Streams) (*Pair, error) {
	front, far, err := g.Ports()
	if err != nil {
		return nil, err
	}
	conf := func(half, rest string) (string, error) {
		return g.File("stunnel-"+half+".conf", fmt.Sprintf(`foreground = yes
debug = err
pid =
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[s]
sslVersion = TLSv1.3
ciphersuites = %s
curves = %s
options = NO_TICKET
sessionCacheSize = 1
cert = %s/%s.pem
CAfile = %s/ca.pem
verifyChain = yes
%s`, suite, s.Group, g.Dir, half, g.Dir, rest))
	}
	back, err := conf("server", fmt.Sprintf("accept = %s\nconnect = %s\n", far, s.Origin))
	if err != nil {
		return nil, err
	}
	head, err := conf("client", fmt.Sprintf("client = yes\naccept = %s\nconnect = %s\ncheckHost = server.bench.test\n", front, far))
	if err != nil {
		return nil, err
	}
	p := &Pair{Name: "stunnel", Target: front, Settings: fmt.Sprintf("%s, threads, %s, %s", Version("stunnel", "-version"), suite, s.Group)}
	return p, g.SpawnPair(ctx, p, far, []string{"stunnel", back}, []string{"stunnel", head})
}
