package main

import (
	"context"
	"crypto/tls"
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
	p.Load = b.load
	return p, b.SpawnPair(ctx, &p.Pair, far, back, front)
}

// nginx is a pair of nginx with so many workers each. Its hop is HTTP/1.1: it
// speaks nothing else to upstreams.
func (b *bench) nginx(ctx context.Context, workers int) (*pair, error) {
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	common := func(name, server string) (string, error) {
		return b.Nginx(name, workers, `proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
  proxy_buffers 16 16k; proxy_buffer_size 16k; proxy_max_temp_file_size 0;
  `+server)
	}
	back, err := common(fmt.Sprintf("nginx%d-back", workers), fmt.Sprintf(`upstream o { server %s; keepalive 2000; keepalive_requests 100000000; keepalive_timeout 300; }
  server {
    listen %s ssl;
    ssl_protocols TLSv1.3; ssl_certificate %s/server.pem; ssl_certificate_key %s/server.pem;
    ssl_verify_client on; ssl_client_certificate %s/ca.pem; ssl_buffer_size 16k;
    location / { proxy_pass http://o; }
  }`, b.origin, far, b.Dir, b.Dir, b.Dir))
	if err != nil {
		return nil, err
	}
	head, err := common(fmt.Sprintf("nginx%d-front", workers), fmt.Sprintf(`upstream o { server %s; keepalive 2000; keepalive_requests 100000000; keepalive_timeout 300; }
  server {
    listen %s;
    location / {
      proxy_pass https://o; proxy_ssl_protocols TLSv1.3; proxy_ssl_name server.bench.test; proxy_ssl_server_name on;
      proxy_ssl_certificate %s/client.pem; proxy_ssl_certificate_key %s/client.pem;
      proxy_ssl_verify on; proxy_ssl_trusted_certificate %s/ca.pem;
    }
  }`, far, front, b.Dir, b.Dir, b.Dir))
	if err != nil {
		return nil, err
	}
	p := &pair{Pair: rig.Pair{Name: fmt.Sprintf("nginx-w%d", workers), Target: front, Workers: true,
		Settings: fmt.Sprintf("%s, %d workers each, no access log, keep-alive on both sides", rig.Version("nginx", "-v"), workers)}, Trace: true}
	return b.spawnPair(ctx, p, far, []string{"nginx", "-c", back}, []string{"nginx", "-c", head})
}

// haproxy is a pair of HAProxy with so many threads each, the hop as HTTP/2 or
// HTTP/1.1.
func (b *bench) haproxy(ctx context.Context, threads int, h2 bool) (*pair, error) {
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	name, alpn, offer := fmt.Sprintf("haproxy-t%d", threads), "alpn http/1.1", ""
	if h2 {
		name, alpn, offer = fmt.Sprintf("haproxy-h2-t%d", threads), "alpn h2", "alpn h2"
	}
	back, err := b.HAProxy(name+"-back", threads, fmt.Sprintf(`frontend f
  bind %s ssl crt %s/server.pem ca-file %s/ca.pem verify required %s
  default_backend o
backend o
  server s %s maxconn 4000 pool-max-conn 4000
`, far, b.Dir, b.Dir, alpn, b.origin))
	if err != nil {
		return nil, err
	}
	head, err := b.HAProxy(name+"-front", threads, fmt.Sprintf(`frontend f
  bind %s
  default_backend o
backend o
  server s %s ssl crt %s/client.pem ca-file %s/ca.pem verify required sni str(server.bench.test) %s maxconn 4000 pool-max-conn 4000
`, front, far, b.Dir, b.Dir, offer))
	if err != nil {
		return nil, err
	}
	hop := "HTTP/1.1"
	if h2 {
		hop = "HTTP/2"
	}
	p := &pair{Pair: rig.Pair{Name: name, Target: front, Settings: fmt.Sprintf("%s, %d threads each, hop %s, http-reuse always, no log", rig.Version("haproxy", "-v"), threads, hop)}, Trace: true}
	return b.spawnPair(ctx, p, far, []string{"haproxy", "-db", "-f", back}, []string{"haproxy", "-db", "-f", head})
}

// reverse is a pair of net/http/httputil.ReverseProxy.
func (b *bench) reverse(ctx context.Context) (*pair, error) {
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	p := &pair{Pair: rig.Pair{Name: "nethttp", Target: front, Settings: "httputil.ReverseProxy, HTTP/1.1, 2,000 idle connections kept"}, Trace: true}
	return b.spawnPair(ctx, p, far,
		[]string{b.Self, "reverse", b.Dir, far, "http://" + b.origin}, []string{b.Self, "reverse", b.Dir, front, "https://" + far})
}

// speaksHTTP1 has net/http speak nothing else.
func speaksHTTP1(srv *http.Server, tr *http.Transport) {
	srv.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	tr.MaxIdleConns, tr.MaxIdleConnsPerHost = 4000, 2000
}
