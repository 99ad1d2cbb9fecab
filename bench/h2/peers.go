package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"

	"sallyport/bench/rig"
)

// A pair is two proxies under the load of this bench.
type pair struct {
	rig.Pair
	trace bool
	load  *rig.Loader[order, rig.Calls]
}

// bench is what all pairs share.
type bench struct {
	*rig.Ground
	origin string
	load   *rig.Loader[order, rig.Calls] // of the pairs that are not ours
}

// spawnPair starts two proxies, the far one first, and waits for both.
func (b *bench) spawnPair(ctx context.Context, p *pair, far string, back, front []string) (*pair, error) {
	p.load, p.trace = b.load, true
	return p, b.SpawnPair(ctx, &p.Pair, far, back, front)
}

// nginx is a pair of nginx with so many workers each. What it has to speak
// HTTP/2 to an upstream is grpc_pass, which carries any request.
func (b *bench) nginx(ctx context.Context, workers int) (*pair, error) {
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	common := func(name, server string) (string, error) {
		home := filepath.Join(b.Dir, name)
		if err := os.MkdirAll(home, 0o700); err != nil {
			return "", err
		}
		return b.File(name+".conf", fmt.Sprintf(`daemon off;
worker_processes %d;
pid %s/pid;
error_log %s/error.log;
events { worker_connections 8192; multi_accept on; }
http {
  access_log off;
  client_body_temp_path %s/b; proxy_temp_path %s/p; fastcgi_temp_path %s/f; uwsgi_temp_path %s/u; scgi_temp_path %s/s;
  keepalive_timeout 300; keepalive_requests 100000000; http2_max_concurrent_streams 256;
  grpc_set_header Host $host; grpc_buffer_size 64k;
  %s
}
`, workers, home, home, home, home, home, home, home, server))
	}
	back, err := common(fmt.Sprintf("nginx%d-back", workers), fmt.Sprintf(`upstream o { server %s; keepalive 2000; keepalive_requests 100000000; keepalive_timeout 300; }
  server {
    listen %s ssl http2;
    ssl_protocols TLSv1.3; ssl_certificate %s/server.pem; ssl_certificate_key %s/server.pem;
    ssl_verify_client on; ssl_client_certificate %s/ca.pem; ssl_buffer_size 16k;
    location / { grpc_pass grpc://o; }
  }`, b.origin, far, b.Dir, b.Dir, b.Dir))
	if err != nil {
		return nil, err
	}
	head, err := common(fmt.Sprintf("nginx%d-front", workers), fmt.Sprintf(`upstream o { server %s; keepalive 2000; keepalive_requests 100000000; keepalive_timeout 300; }
  server {
    listen %s http2;
    location / {
      grpc_pass grpcs://o; grpc_ssl_protocols TLSv1.3; grpc_ssl_name server.bench.test; grpc_ssl_server_name on;
      grpc_ssl_certificate %s/client.pem; grpc_ssl_certificate_key %s/client.pem;
      grpc_ssl_verify on; grpc_ssl_trusted_certificate %s/ca.pem;
    }
  }`, far, front, b.Dir, b.Dir, b.Dir))
	if err != nil {
		return nil, err
	}
	p := &pair{Pair: rig.Pair{Name: fmt.Sprintf("nginx-w%d", workers), Target: front, Workers: true,
		Settings: fmt.Sprintf("%s, %d workers each, grpc_pass on both, no access log, keep-alive on both sides", rig.Version("nginx", "-v"), workers)}}
	return b.spawnPair(ctx, p, far, []string{"nginx", "-c", back}, []string{"nginx", "-c", head})
}

// haproxy is a pair of HAProxy with so many threads each, HTTP/2 throughout.
func (b *bench) haproxy(ctx context.Context, threads int) (*pair, error) {
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("haproxy-t%d", threads)
	common := func(file, rest string) (string, error) {
		return b.File(file, fmt.Sprintf(`global
  nbthread %d
  maxconn 8000
  tune.h2.max-concurrent-streams 256
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  timeout client 300s
  timeout server 300s
  timeout connect 5s
  timeout http-keep-alive 300s
  http-reuse always
%s`, threads, rest))
	}
	back, err := common(name+"-back.cfg", fmt.Sprintf(`frontend f
  bind %s ssl crt %s/server.pem ca-file %s/ca.pem verify required alpn h2
  default_backend o
backend o
  server s %s proto h2 maxconn 4000 pool-max-conn 4000
`, far, b.Dir, b.Dir, b.origin))
	if err != nil {
		return nil, err
	}
	head, err := common(name+"-front.cfg", fmt.Sprintf(`frontend f
  bind %s proto h2
  default_backend o
backend o
  server s %s ssl crt %s/client.pem ca-file %s/ca.pem verify required sni str(server.bench.test) alpn h2 maxconn 4000 pool-max-conn 4000
`, front, far, b.Dir, b.Dir))
	if err != nil {
		return nil, err
	}
	p := &pair{Pair: rig.Pair{Name: name, Target: front,
		Settings: fmt.Sprintf("%s, %d threads each, HTTP/2 throughout, 256 streams, http-reuse always, no log", rig.Version("haproxy", "-v"), threads)}}
	return b.spawnPair(ctx, p, far, []string{"haproxy", "-db", "-f", back}, []string{"haproxy", "-db", "-f", head})
}

// reverse is a pair of net/http/httputil.ReverseProxy.
func (b *bench) reverse(ctx context.Context) (*pair, error) {
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	p := &pair{Pair: rig.Pair{Name: "nethttp", Target: front, Settings: "httputil.ReverseProxy, HTTP/2 throughout, 1,000 streams"}}
	return b.spawnPair(ctx, p, far,
		[]string{b.Self, "reverse", b.Dir, far, "http://" + b.origin}, []string{b.Self, "reverse", b.Dir, front, "https://" + far})
}

// serveReverse is one half of the pair: towards https it is the client's.
func serveReverse(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("%d arguments, want a folder, where to listen and where to", len(args))
	}
	dir, listen, to := args[0], args[1], args[2]
	u, err := url.Parse(to)
	if err != nil {
		return err
	}
	near := u.Scheme == "https"
	half := "server"
	if near {
		half = "client"
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, half+".pem"), filepath.Join(dir, half+".pem"))
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: roots, ClientCAs: roots,
		ClientAuth: tls.RequireAndVerifyClientCert, ServerName: "server.bench.test",
	}
	var h2 http.Protocols
	h2.SetHTTP2(true)
	h2.SetUnencryptedHTTP2(true)
	limits := &http.HTTP2Config{MaxConcurrentStreams: 1000}
	tr := &http.Transport{TLSClientConfig: conf, DisableCompression: true, Protocols: &h2, HTTP2: limits}
	srv := &http.Server{Addr: listen, TLSConfig: conf, Protocols: &h2, HTTP2: limits, Handler: &httputil.ReverseProxy{
		Transport: tr,
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u); r.Out.Host = r.In.Host },
	}}
	if near {
		return srv.ListenAndServe()
	}
	return srv.ListenAndServeTLS("", "")
}
