package proxy

import (
	"errors"
	"net/http"

	"sallyport/internal/translate"
)

// Where a service has two faces, its policy speaks of the methods of gRPC, and
// whatever face a call has is judged, limited and recorded as its method.

// verb and path are what the call is judged and recorded as.
func (x *call) verb() string {
	if x.face.Method != "" {
		return http.MethodPost
	}
	return x.req.Verb()
}

func (x *call) path() string {
	if x.face.Method != "" {
		return x.face.Method
	}
	return x.req.PathText()
}

// method finds the method that a call means. One that means none is judged as
// what it says, so that nobody learns by it what there is, and goes no further.
func (in *Inbound) method(x *call) *refusal {
	if !in.cfg.Translate.On() {
		return nil
	}
	x.translated = true
	var err error
	x.face, err = in.cfg.Translate.Face(x.ctx, translate.Request{Verb: x.req.Verb(), Path: string(x.req.Path), ContentType: string(x.req.Get("content-type"))})
	switch {
	case errors.Is(err, translate.ErrFace):
		return &refusal{status: http.StatusUnsupportedMediaType, reason: "translate", detail: err.Error()}
	case err != nil:
		x.err = err
		return &refusal{status: http.StatusServiceUnavailable, reason: "translate", detail: "the methods of the service are not known yet"}
	}
	return nil
}

// translates has the call say what it was judged as, if it goes to the translator.
func (x *call) translates() *refusal {
	switch {
	case !x.translated:
	case x.face.Method == "":
		return &refusal{status: http.StatusNotFound, reason: "translate", detail: "the service has no such method"}
	case x.face.Translated:
		x.extra = append(append(append(x.extra, translate.MethodField+": "...), x.face.Method...), "\r\n"...)
	}
	return nil
}
