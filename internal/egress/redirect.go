package egress

import (
	"net"
	"net/url"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// redirect has an answer that leads the caller to https lead to http, where that
// is what the gateway makes https of again. Elsewhere it stays as it is: to follow
// it is another request, or tunnel, and another decision.
func (f *fetch) redirect(resp *http1.Response) {
	x := &f.a.ex
	x.ToDown.Also, x.ToDown.Extra = nil, nil
	if f.how.TLS != mesh.Originate {
		return
	}
	u, err := url.Parse(string(resp.Get("location")))
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return
	}
	host, err := ParseHost(u.Hostname())
	if err != nil {
		return
	}
	if how, err := routeOf(f.snap, host); err != nil || how.TLS != mesh.Originate {
		return
	}
	port := u.Port()
	u.Scheme, u.Host = "http", host.String()
	if port != "" && port != "443" {
		u.Host = net.JoinHostPort(host.String(), port)
	}
	x.ToDown.Also, x.ToDown.Extra = location, []byte("Location: "+u.String()+"\r\n")
}
