package main

import (
	"context"
	"fmt"
	"net/http"

	"sallyport/bench/rig"
)

// A pair is two proxies under the load of this bench.
type pair = rig.Loaded[order]

// bench is what all pairs share.
type bench struct {
	*rig.Ground
	origin string
	load   *rig.Loader[order, rig.Calls] // of the pairs that are not ours
}

// spawnPair starts two proxies, the far one first, and waits for both.
func (b *bench) spawnPair(ctx context.Context, p *pair, far string, back, front []string) (*pair, error) {
	p.Load, p.Trace = b.load, true
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
		return b.Nginx(name, workers, "http2_max_concurrent_streams 256; grpc_set_header Host $host; grpc_buffer_size 64k;\n  "+server)
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
	const streams = "global\n  tune.h2.max-concurrent-streams 256\n"
	back, err := b.HAProxy(name+"-back", threads, streams+fmt.Sprintf(`frontend f
  bind %s ssl crt %s/server.pem ca-file %s/ca.pem verify required alpn h2
  default_backend o
backend o
  server s %s proto h2 maxconn 4000 pool-max-conn 4000
`, far, b.Dir, b.Dir, b.origin))
	if err != nil {
		return nil, err
	}
	head, err := b.HAProxy(name+"-front", threads, streams+fmt.Sprintf(`frontend f
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

// speaksHTTP2 has net/http speak nothing else.
func speaksHTTP2(srv *http.Server, tr *http.Transport) {
	var h2 http.Protocols
	h2.SetHTTP2(true)
	h2.SetUnencryptedHTTP2(true)
	limits := &http.HTTP2Config{MaxConcurrentStreams: 1000}
	srv.Protocols, srv.HTTP2 = &h2, limits
	tr.Protocols, tr.HTTP2 = &h2, limits
}
